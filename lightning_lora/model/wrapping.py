"""Wrap functions of other packages at the first use of adapters, and put them back with :func:`unwrap_all`.

Torch, Lightning and transformers offer no hook in some places that must know about adapters. There a function of
theirs is replaced by one that runs its own code before or after it. Where no adapters are involved, it behaves as ever.
"""

import functools
import inspect
import sys
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch.utils.checkpoint as torch_checkpoint
from torch import nn

from lightning_lora.compat.torch import checkpoint_frame
from lightning_lora.layers import LoRALayer
from lightning_lora.model.names import clean_name
from lightning_lora.model.spread import WHAT_TO_WRITE, class_name
from lightning_lora.model.written_config import quantization_in_config
from lightning_lora.ops.dropout import Seeds
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


# the changes that are made at present, by what is changed: one of each kind for a model
switched: dict[Hashable, Switch] = {}


def switch_on(key: Hashable, switch: Switch) -> None:
    """Make a change, and note that it is made."""
    switch.enter()
    switched[key] = switch


def switch_off(key: Hashable) -> None:
    """Undo a change that is made."""
    switched.pop(key).leave()


@at_injection
def keep_state_of_forward() -> None:
    """Make torch's and Megatron-core's activation checkpoints recompute with the changes that were made in forward, and
    with the dropout seeds of named adapters that were next then.

    No hook serves both of torch's variants, so a method of their classes is wrapped, once in a process. Where nothing
    was switched in between, they recompute as before.
    """
    wrap(checkpoint_frame(), "__init__", functools.partial(_with_present_state, runs_first=False))
    megatron = sys.modules.get("megatron.core.tensor_parallel.random")
    for module in (torch_checkpoint, megatron):
        if (function := getattr(module, "CheckpointFunction", None)) is not None:
            wrap(function, "forward", lambda forward: staticmethod(_with_present_state(forward, runs_first=True)))


def _with_present_state(method: Callable[..., Any], *, runs_first: bool) -> Callable[..., Any]:
    """Wrap a method that takes the function to recompute: it will run with the changes that are made at the call.

    Args:
        runs_first: the method calls the function in forward, too.
    """

    @functools.wraps(method)
    def wrapped(own: Any, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return method(own, _Recomputed(function, runs_first=runs_first), *args, **kwargs)

    return wrapped


class _Recomputed:
    """A function that is recomputed with the changes that were made, and the seeds that were next, at its creation."""

    def __init__(self, function: Callable[..., Any], *, runs_first: bool) -> None:
        self.function, self.runs_first = function, runs_first
        self.switched, self.seeds = dict(switched), Seeds.positions()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.runs_first:
            self.runs_first = False
            return self.function(*args, **kwargs)
        with _switched_as(self.switched), Seeds.at(self.seeds):
            return self.function(*args, **kwargs)


@contextmanager
def _switched_as(then: dict[Hashable, Switch]) -> Iterator[None]:
    """Make the changes ``then`` inside the block, in the place of the present ones."""
    now = dict(switched)
    leaving = [key for key in now if now[key] is not then.get(key)]
    entering = [key for key in then if then[key] is not now.get(key)]
    for switch in (*(now[key] for key in leaving), *(then[key] for key in entering)):
        switch.check_in_backward()
    with ExitStack() as stack:
        for key in leaving:
            switch_off(key)
            stack.callback(switch_on, key, now[key])
        for key in entering:
            switch_on(key, then[key])
            stack.callback(switch_off, key)
        yield


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
    if any(layer.may_act for layer in layers.values()):
        raise ValueError(
            f"save_pretrained would write the adapters of {class_name(model)} under names that from_pretrained drops, "
            "and the base alone would be read back. To write the adapter, call save_peft(model, directory). To write "
            "the merged model, call model.save_pretrained(directory) inside `with merged(model):`, or after "
            "merge(model, remove=True)"
        )
    return kept
