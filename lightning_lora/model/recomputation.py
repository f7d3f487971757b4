"""Recompute a checkpointed block with the adapters that its forward had, also beside ``disabled(model)``.

Backward may run after ``disabled`` was entered or left. torch restores the random state and autocast for what it
recomputes; it knows nothing of adapters.
"""

import functools
import sys
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Protocol

import torch.utils.checkpoint as torch_checkpoint
from torch import nn

from lightning_lora.compat.torch import checkpoint_frame
from lightning_lora.compat.transformers import checkpoint_function
from lightning_lora.model.wrapping import at_injection, wrap


class Switch(Protocol):
    """A change of a model that can be made and undone any number of times."""

    def enter(self) -> None:
        """Make the change."""

    def leave(self) -> None:
        """Undo it."""

    def check_in_backward(self) -> None:
        """Raise ``RuntimeError`` if it cannot be made or undone while backward runs."""


switched: dict[int, Switch] = {}  # the changes that are made at present, by the identity of the model


def switch_on(key: int, switch: Switch) -> None:
    """Make a change, and note that it is made."""
    switch.enter()
    switched[key] = switch


def switch_off(key: int) -> None:
    """Undo a change that is made."""
    switched.pop(key).leave()


@at_injection
def keep_state_of_forward() -> None:
    """Make torch's and Megatron-core's activation checkpoints recompute with the changes that were made in forward.

    No hook serves both of torch's variants, so a method of their classes is wrapped, once in a process. Where nothing
    was switched in between, they recompute as before.
    """
    wrap(checkpoint_frame(), "__init__", _with_present_state)
    megatron = sys.modules.get("megatron.core.tensor_parallel.random")
    for module in (torch_checkpoint, megatron):
        if (function := getattr(module, "CheckpointFunction", None)) is not None:
            wrap(function, "forward", lambda forward: staticmethod(_with_present_state(forward)))


def _with_present_state(method: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a method that takes the function to recompute: it will run with the changes that are made at the call."""

    @functools.wraps(method)
    def wrapped(own: Any, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return method(own, functools.partial(_run_as_then, dict(switched), function), *args, **kwargs)

    return wrapped


def _run_as_then(then: dict[int, Switch], function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if then.keys() == switched.keys():
        return function(*args, **kwargs)
    now = dict(switched)
    for key in now.keys() ^ then.keys():
        (now | then)[key].check_in_backward()
    with ExitStack() as stack:
        for key in now.keys() - then.keys():
            switch_off(key)
            stack.callback(switch_on, key, now[key])
        for key in then.keys() - now.keys():
            switch_on(key, then[key])
            stack.callback(switch_off, key)
        return function(*args, **kwargs)


def let_gradients_through_checkpointed_blocks(root: nn.Module) -> None:
    """Make the output of frozen embeddings require grad where transformers checkpoints its blocks reentrantly.

    A reentrant checkpoint whose input needs no gradient gives its parameters none.
    """
    functions = [checkpoint_function(module) for module in root.modules()]
    reentrant = any(isinstance(f, functools.partial) and f.keywords.get("use_reentrant") for f in functions)
    if reentrant and callable(enable := getattr(root, "enable_input_require_grads", None)):
        enable()
