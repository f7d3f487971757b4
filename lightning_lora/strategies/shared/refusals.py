"""Refuse strategies, files and models that adapter-only checkpoints do not serve, and say what to use."""

import inspect
import io
import pickle
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.model.names import clean_name
from lightning_lora.model.state import injected_roots
from lightning_lora.ops.sharded import is_sharded


def check_served(strategy: object, served: tuple[type[Any], ...]) -> None:
    """Raise ``ValueError`` for a strategy that cannot keep adapter checkpoints exact."""
    is_deepspeed = any(cls.__name__ == "DeepSpeedStrategy" for cls in type(strategy).__mro__)  # derived from DDP's
    if not isinstance(strategy, served) or is_deepspeed:
        raise ValueError(
            f"{type(strategy).__name__} is not supported: its checkpoints would hold the base or lose the adapters. "
            "Use strategy='auto' or 'ddp' (every rank holds the frozen base, and only the adapters' gradients are "
            "exchanged), or 'fsdp_lora' (each rank holds its share of the base)"
        )


def check_reader(checkpoint_io: Any) -> None:
    """Raise ``ValueError`` for a ``CheckpointIO`` of the user's that cannot be told to read without running code."""
    parameters = inspect.signature(checkpoint_io.load_checkpoint).parameters.values()
    if not any(p.name == "weights_only" or p.kind is p.VAR_KEYWORD for p in parameters):
        raise ValueError(
            f"{type(checkpoint_io).__name__}.load_checkpoint takes no weights_only argument, so that its files could "
            "not be read back safely: add `weights_only=None` to it and hand it to torch.load"
        )


def check_readable(content: dict[str, Any], problem: str) -> None:
    """Raise ``ValueError`` for objects that a safe load would refuse, before a file holds them.

    Args:
        problem: begins the error: where the objects come from, and how to leave them out.
    """
    buffer = io.BytesIO()
    torch.save(_without_values(content), buffer)
    buffer.seek(0)
    try:
        torch.load(buffer, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{problem}, or allow their class with torch.serialization.add_safe_globals. {error}"
        ) from error


def _without_values(content: Any) -> Any:
    """Return nested plain containers with empty tensors in place of plain tensors, which every load accepts."""
    if type(content) in (Tensor, nn.Parameter):
        return content.new_empty(0)
    if type(content) in (dict, OrderedDict):
        return type(content)((key, _without_values(value)) for key, value in content.items())
    if type(content) in (list, tuple):
        return type(content)(map(_without_values, content))
    return content


def check_whole(model: nn.Module, strategy: str) -> None:
    """Raise ``ValueError`` for a model that another strategy left in shards."""
    if any(is_sharded(parameter) for parameter in model.parameters()):
        raise ValueError(
            f"the model is in shards, from a run with 'fsdp_lora', and {strategy} wants it whole: build it anew and "
            "give ckpt_path= or init_from=, or go on with 'fsdp_lora'"
        )


def check_has_values(model: nn.Module, strategy: str) -> None:
    """Raise ``ValueError`` for an adapted model on the meta device, under a strategy that does not fill it."""
    name = first_on_meta(model)
    if name is not None and injected_roots(model):
        raise ValueError(
            f"{name!r} is on the meta device, and {strategy} has nothing to fill it from: build the model with its "
            "weights, as from_pretrained does, or use 'fsdp_lora', which reads them by base_weights="
        )


def first_on_meta(model: nn.Module) -> str | None:
    """Return the name of a tensor without values, if there is one."""
    named = (*model.named_parameters(), *model.named_buffers())
    return next((clean_name(name) for name, tensor in named if tensor.device.type == "meta"), None)
