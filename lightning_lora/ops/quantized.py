"""Tell quantised weights from floating-point ones, which adapters need to train and to merge."""

from typing import Any

from torch import Tensor

from lightning_lora.ops.sharded import is_dtensor


def stored_as(tensor: Tensor) -> str | None:
    """Return the dtype or the class that a quantised tensor is stored in; ``None`` for floating-point numbers.

    torchao's tensors wrap integers and scales, and report a floating-point dtype. bitsandbytes' hold codes that may be
    seen as numbers of one.
    """
    if wraps_tensors(tensor) and not is_dtensor(tensor):
        return type(tensor).__name__
    if tensor.is_floating_point():
        return None if getattr(tensor, "quant_state", None) is None else type(tensor).__name__
    return str(tensor.dtype)


def wraps_tensors(tensor: Tensor) -> bool:
    """Whether a tensor is made of inner ones, which torch's protocol of such subclasses names."""
    return hasattr(tensor, "__tensor_flatten__") and hasattr(tensor, "__tensor_unflatten__")


def check_plain(what: str, tensor: Any) -> None:
    """Raise ``ValueError`` for a quantised tensor; ``what`` names it. ``None``, as for a computed weight, passes."""
    kind = None if tensor is None else stored_as(tensor)
    if kind is not None:
        raise ValueError(
            f"{what} is stored as {kind}, and gradients through it and merging need floating-point numbers: load the "
            "base unquantised, in bfloat16 for half the memory, or leave it out with quantize_exclude. How the weight "
            "of a linear layer is read can be said with register_stored_weight"
        )
