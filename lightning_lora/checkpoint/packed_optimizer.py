"""Optimizer states in 8 and 4 bits, of bitsandbytes and torchao, in a checkpoint.

bitsandbytes keeps codes, scales and tables as plain tensors. torchao keeps tensors of its own classes, which a safe
load refuses: a file holds their parts, and the class is looked up where the optimizer is made.
"""

import sys
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_lora.ops.quantized import wraps_tensors
from lightning_lora.ops.sharded import is_dtensor

WRITTEN_BY = "written_by"  # in the state of an optimizer whose states are packed
_PACKAGES = ("bitsandbytes", "torchao")
_FORM = "packed_form"


def packer(optimizer: Optimizer) -> str | None:
    """Return the class of bitsandbytes or torchao that an optimizer is of, without ``Paged``; ``None`` for others."""
    for cls in type(optimizer).__mro__:
        if cls.__module__.split(".")[0] in _PACKAGES:
            return f"{cls.__module__}.{cls.__qualname__.removeprefix('Paged')}"
    return None


def check_packer(state: Mapping[str, Any], optimizer: Optimizer, source: Any) -> None:
    """Raise ``ValueError`` for a state that an optimizer of another kind packed, or did not pack."""
    saved, own = state.get(WRITTEN_BY), packer(optimizer)
    if saved != own:
        raise ValueError(
            f"the optimizer state in {source} was written by {saved or 'an optimizer that keeps plain numbers'}, and "
            f"the run has {own or type(optimizer).__name__}, which keeps its state in another form. Resume with the "
            "optimizer that the file was written with, or warm-start with LoRACallback(init_from=...)"
        )


def is_packed(value: Any) -> bool:
    """Whether a value of an optimizer's state is a tensor that wraps others."""
    return isinstance(value, Tensor) and wraps_tensors(value) and not is_dtensor(value)


def parts_of(value: Any) -> dict[str, Any]:
    """Return a tensor that wraps others as plain values."""
    names, context = value.__tensor_flatten__()
    form = f"{type(value).__module__}.{type(value).__qualname__}"
    return {_FORM: form, "parts": {name: getattr(value, name) for name in names}, "context": list(context)}


def with_packed(state: dict[str, Any], source: Any) -> dict[str, Any]:
    """Return an optimizer's state with the tensors of which :func:`parts_of` returned plain values."""
    entries = {
        key: {name: _tensor(value, source) for name, value in entry.items()} if isinstance(entry, dict) else entry
        for key, entry in state["state"].items()
    }
    return {**{key: value for key, value in state.items() if key != WRITTEN_BY}, "state": entries}


def _tensor(value: Any, source: Any) -> Any:
    if not isinstance(value, dict) or _FORM not in value:
        return value
    module, _, name = str(value[_FORM]).rpartition(".")
    cls = getattr(sys.modules.get(module), name, None)
    is_known = module.split(".")[0] in _PACKAGES and isinstance(cls, type) and issubclass(cls, Tensor)
    if not is_known:
        raise ValueError(f"{source} holds an optimizer state as {value[_FORM]}, which the installed package lacks")
    made: Any = cls
    return made.__tensor_unflatten__(value["parts"], value["context"])
