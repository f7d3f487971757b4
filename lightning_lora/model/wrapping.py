"""Wrap functions of other packages at the first use of adapters, and put them back with :func:`unwrap_all`.

Torch, Lightning and transformers offer no hook in some places that must know about adapters. There a function of
theirs is replaced by one that runs its own code before or after it. Where no adapters are involved, it behaves as ever.
"""

import functools
import inspect
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any, Protocol

import torch.utils.checkpoint as torch_checkpoint
from torch import nn

from lightning_lora.compat.torch import checkpoint_frame
from lightning_lora.layers import LoRALayer
from lightning_lora.model.names import clean_name
from lightning_lora.model.spread import WHAT_TO_WRITE, class_name
from lightning_lora.model.written_config import quantization_in_config
from lightning_lora.ops.sharded import is_part

_WRAPPED: dict[tuple[Any, str], tuple[Any, Any]] = {}  # (owner, name) -> (its former value, ours)


_AT_INJECTION: list[Callable[[], None]] = []


def wrap(owner: Any, name: str, wrapper: Callable[[Any], Any]) -> None:
    """Replace ``owner.name`` by ``wrapper(owner.name)``; a second call for the same name does nothing.

    Args:
        owner: a class or a module.
    """
    if (owner, name) not in _WRAPPED:
        former, ours = vars(owner).get(name), wrapper(getattr(owner, name))
        setattr(owner, name, ours)
        _WRAPPED[owner, name] = (former, ours)


def unwrap_all() -> None:
    """Put every function back that :func:`wrap` replaced, except where somebody else has replaced ours since."""
    for (owner, name), (former, ours) in _WRAPPED.items():
        if vars(owner).get(name) is ours and former is None:  # it was inherited
            delattr(owner, name)
        elif vars(owner).get(name) is ours:
            setattr(owner, name, former)
    _WRAPPED.clear()


def at_injection(action: Callable[[], None]) -> Callable[[], None]:
    """Decorate a function that wraps something: it is called whenever a model is adapted in this process.

    That is by ``inject``, or because the adapted model was copied or came from another process.
    """
    _AT_INJECTION.append(action)
    return action


def run_at_injection() -> None:
    """Call what :func:`at_injection` decorates."""
    for action in _AT_INJECTION:
        action()


class Switch(Protocol):
    """A change of a model that is made by ``enter`` and undone by ``leave``, any number of times.

    ``check_in_backward`` raises ``RuntimeError`` if that cannot be while backward runs.
    """

    def enter(self) -> None: ...
    def leave(self) -> None: ...
    def check_in_backward(self) -> None: ...


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


# the classes that models inherit the method from, by the modules that define them
_WRITERS = {
    "transformers.modeling_utils": "PreTrainedModel",
    "diffusers.models.modeling_utils": "ModelMixin",
    "huggingface_hub.hub_mixin": "ModelHubMixin",
}


@at_injection
def guard_save_pretrained() -> None:
    """Wrap ``save_pretrained`` of imported model classes so that it looks for adapters. A second call does nothing.

    While the adapters are merged or disabled, the model is written as it computes; without their tensors, if the method
    takes ``state_dict=``. While they are active, and of a model that is spread over ranks, it is an error that says
    what to write instead. A model without adapters, and a ``state_dict=`` without any, is written as ever; of a base
    that is quantised the config says so.
    """
    for module, name in _WRITERS.items():
        if (cls := getattr(sys.modules.get(module), name, None)) is not None:
            wrap(cls, "save_pretrained", _looking_for_adapters)


def _looking_for_adapters(method: Any) -> Any:
    signature = inspect.signature(method)

    @functools.wraps(method)
    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self, nn.Module):
            return method(self, *args, **kwargs)
        call = signature.bind(self, *args, **kwargs)
        state = _without_adapters(self, call.arguments.get("state_dict"))
        if state is not None and "state_dict" in signature.parameters:
            call.arguments["state_dict"] = state
        with quantization_in_config(self):
            return method(*call.args, **call.kwargs)

    return save_pretrained


def _without_adapters(model: nn.Module, state: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return what to write of ``state``, or of the model's own; ``None`` if that holds no adapters.

    Raises:
        ValueError: the adapters are active, or the model is spread over ranks.
    """
    if state is None and any(is_part(parameter) for parameter in model.parameters()):
        raise ValueError(
            f"save_pretrained would write this rank's parts of {class_name(model)}, which is spread over ranks. "
            + WHAT_TO_WRITE
        )
    layers = {name: m for name, m in model.named_modules(remove_duplicate=False) if isinstance(m, LoRALayer)}
    adapters = {clean_name(f"{name}.{local}") for name, layer in layers.items() for local in layer.tensor_names}
    state = model.state_dict() if state is None and layers else state or {}
    kept = {name: value for name, value in state.items() if clean_name(name) not in adapters}
    if len(kept) == len(state):
        return None
    if any(layer.lora_active for layer in layers.values()):
        raise ValueError(
            f"save_pretrained would write the adapters of {class_name(model)} under names that from_pretrained drops, "
            "and the base alone would be read back. To write the adapter, call save_peft(model, directory). To write "
            "the merged model, call model.save_pretrained(directory) inside `with merged(model):`, or after "
            "merge(model, remove=True)"
        )
    return kept
