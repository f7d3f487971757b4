""":class:`StoredWeight`, a weight that is no plain tensor: it is made dense each time that it is multiplied by.

Functions that take one keep its stored form for backward, and make it dense again there, one weight at a time, when x
needs a gradient.
"""

import functools
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lora.compat.torch import is_transformed, onednn_linear, unsafe_view, untraced
from lightning_lora.ops.autocast import autocast_dtype


class StoredWeight(Protocol):
    """What is multiplied as a matrix and stored in another form.

    Attributes:
        shape: ``[out_features, in_features]``.
        dtype: that the weight has as a tensor.
        device: where it is made dense.
    """

    @property
    def shape(self) -> torch.Size: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def device(self) -> torch.device: ...

    def dense(self, dtype: torch.dtype) -> Tensor:
        """Return the values in ``dtype``, in memory of their own."""
        ...


def dense_like(weight: Any, like: Tensor) -> Tensor:
    """Return a weight, a tensor or a :class:`StoredWeight`, as a tensor of the dtype of ``like``."""
    if isinstance(weight, Tensor):
        return weight.to(like.dtype)
    with untraced() if torch.jit.is_tracing() else nullcontext():  # it cannot record views of bytes as numbers
        dense: Tensor = weight.dense(like.dtype)
    return dense


def dense_again(weight: Any, grad: Tensor) -> Tensor:
    """Return the same in backward, for a gradient of the output.

    torch.compile would keep the dense weight of forward, which is equal. A :class:`StoredWeight` with a method
    ``after`` is made dense from copies of its parts, which exist only once ``grad`` does.
    """
    if torch.compiler.is_compiling() and hasattr(weight, "after"):
        weight = weight.after(grad)
    return dense_like(weight, grad)


ONEDNN_ROWS = 64  # oneDNN keeps half a MB for every number of rows that it is given, so it is given one


def dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return ``x W^T + b`` for a weight that was made dense.

    Args:
        weight: ``[out, in]``; a transposed view is as fast.
    """
    if not runs_in_onednn(x):
        return F.linear(x, weight, bias)
    parts = x.reshape(-1, x.shape[-1]).split(ONEDNN_ROWS)
    y = torch.cat([(onednn_linear if len(rows) == ONEDNN_ROWS else F.linear)(rows, weight, bias) for rows in parts])
    return unsafe_view(y, [*x.shape[:-1], y.shape[-1]])


def runs_in_onednn(x: Tensor) -> bool:
    """Whether :func:`dense_linear` of ``x`` runs in oneDNN, of which torch knows no derivative.

    torch multiplies float32 by MKL, which leaves AVX-512 unused on AMD's CPUs; oneDNN takes half of its time there. The
    product over a float base is left to torch, for it is bit for bit the base's own.
    """
    is_plain = x.device.type == "cpu" and x.dtype == torch.float32 and not torch.compiler.is_compiling()
    return is_plain and not torch.is_grad_enabled() and bool(torch.backends.mkldnn.enabled) and _has_slow_mkl()


@functools.cache
def _has_slow_mkl() -> bool:
    """Whether torch multiplies float32 by MKL on an AMD CPU that has AVX-512, and could do so by oneDNN."""
    cpu_info = Path("/proc/cpuinfo")
    has_both = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    is_wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return has_both and is_wide and cpu_info.exists() and "AuthenticAMD" in cpu_info.read_text()


@torch.library.custom_op("lightning_lora::copy_after", mutates_args=())
def copy_after(part: Tensor, grad: Tensor) -> Tensor:
    """Return a copy of ``part`` that torch.compile cannot make before ``grad``."""
    return part.clone()


@copy_after.register_fake
def _(part: Tensor, grad: Tensor) -> Tensor:
    return torch.empty_like(part)


@functools.cache
def let_copy_after(kind: type[Tensor]) -> None:
    """Let :func:`copy_after` copy a tensor subclass, part by part."""

    def copy_parts(_: Any, function: Any, types: Any, args: Any, kwargs: Any) -> Any:
        tensor, grad = args
        names, context = tensor.__tensor_flatten__()
        copies = {name: copy_after(getattr(tensor, name), grad) for name in names}
        return kind.__tensor_unflatten__(copies, context, tensor.shape, tensor.stride())  # type: ignore[attr-defined]

    copy_after.register_torch_dispatch(kind, copy_parts)


def apart(weights: Sequence[Any]) -> tuple[list[Any], list[Tensor | None]]:
    """Return the :class:`StoredWeight`s and the tensors among weights, each list with ``None`` for the others."""
    stored = [None if weight is None or isinstance(weight, Tensor) else weight for weight in weights]
    return stored, [weight if one is None else None for one, weight in zip(stored, weights, strict=True)]


def together(stored: Sequence[Any], tensors: Sequence[Tensor | None]) -> list[Any]:
    """Return the weights of which :func:`apart` returned the two lists."""
    return [tensor if one is None else one for one, tensor in zip(stored, tensors, strict=True)]


class _StoredLinear(torch.autograd.Function):
    """``x W^T + b`` for a frozen W that is made dense again for the gradient of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, stored: StoredWeight, bias: Tensor | None) -> Tensor:
        ctx.stored = stored
        return dense_linear(x, dense_like(stored, x), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_x = dense_linear(grad, dense_again(ctx.stored, grad).t()) if ctx.needs_input_grad[0] else None
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.needs_input_grad[2] else None
        return grad_x, None, grad_bias


def stored_linear(x: Tensor, stored: StoredWeight, bias: Tensor | None) -> Tensor:
    """Return ``x W^T + b`` in the dtype of ``x``, or in autocast's; kept for backward is the stored form of W alone.

    Args:
        x: ``[..., in_features]``.
        stored: of shape ``[out_features, in_features]``.
        bias: ``[out_features]`` or ``None``.
    """
    dtype = autocast_dtype(x)
    x = x if dtype is None or x.dtype == torch.float64 else x.to(dtype)
    bias = None if bias is None else bias.to(x.dtype)
    with torch.autocast(x.device.type, enabled=False):
        if is_transformed():
            return F.linear(x, dense_like(stored, x), bias)
        y: Tensor = _StoredLinear.apply(x, stored, bias)  # type: ignore[no-untyped-call]
        return y
