"""Private names of Megatron-core, which is imported by the functions that need it."""

import importlib
import inspect
from collections.abc import Callable
from typing import Any

from lightning_lora.compat.lookup import private


def check_linear_product(layer: type) -> None:
    """Check that a linear layer computes its local product in a method of its class. Relies on its name, and arguments.

    It is a method since 0.14; before, every forward set it anew on the instance.

    Raises:
        ImportError: it does not.
    """
    method = vars(layer).get("_forward_impl")
    names = inspect.signature(method).parameters if callable(method) else {}
    if not {"self", "input", "weight"} <= set(names):
        raise ImportError(
            f"{layer.__name__} of this megatron-core has no method _forward_impl(input, weight, ...), in which "
            "adapters are computed: install one of the versions that 'megatron_lora' is tested with, 0.14 to 0.16"
        )


def set_random_state_functions(read: Callable[..., Any], write: Callable[..., Any]) -> None:
    """Replace how Megatron-core reads and writes the device's random state. Relies on both names; else raises."""
    random = "megatron.core.tensor_parallel.random"
    for name, function in (("_get_cuda_rng_state", read), ("_set_cuda_rng_state", write)):
        private("megatron-core", random, name)
        vars(importlib.import_module(random))[name] = function


def skip_copies_to_host(dispatcher: Any) -> None:
    """Let a dispatcher of experts copy no counts on a stream of its own. Relies on its method; without it raises.

    It copies the numbers of tokens per expert; with all experts on every rank nothing else is read on the host.
    """
    private("megatron-core", dispatcher, "_maybe_dtoh_and_synchronize")
    dispatcher._maybe_dtoh_and_synchronize = lambda self, point, tokens_per_expert=None: tokens_per_expert
