"""The products of rank r, each in the layout and the order that is fast on its device.

Nothing here knows autograd: forward and backward are put together of these in ``functional.py`` and ``fused.py``. None
changes what it is given.
"""

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def down(rows: Tensor, lora_A: Tensor, kept: Tensor | None) -> Tensor:
    """Return ``kept * x A^T``, ``[T, r]``: no factor is on it, those go with the products that it enters."""
    return skinny(rows if kept is None else rows * kept, lora_A.to(rows.dtype))


def skinny(rows: Tensor, factor: Tensor) -> Tensor:
    """Return ``rows factor^T``, ``[T, r]``, with r on the side of the product where the device is fast.

    CPU libraries are several times faster with the short dimension first, and so the result is kept transposed there.
    """
    if rows.device.type == "cpu":
        return torch.mm(factor, rows.t()).t()
    return torch.mm(rows, factor.t())


def scaled_mm(left: Tensor, right: Tensor, factor: float, dtype: torch.dtype | None = None) -> Tensor:
    """Return ``factor * left right`` in one kernel, in ``dtype``; a device that can does not round in between."""
    if dtype in (None, left.dtype):
        return torch.addmm(left.new_empty(()), left, right, beta=0, alpha=factor)
    if dtype == torch.float32 and not torch.is_grad_enabled() and _accumulates_out(left.device, left.dtype):
        wide: Tensor = torch.mm(left, right, out_dtype=torch.float32)
        return wide.mul_(factor)
    return scaled_mm(left, right, factor).to(dtype)


@functools.cache
def _accumulates_out(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether products of a narrow dtype can be written in float32 on a device: CUDA, torch 2.8."""
    if device.type != "cuda":
        return False
    probe = torch.ones(16, 16, device=device, dtype=dtype)
    try:
        return bool(torch.mm(probe, probe, out_dtype=torch.float32).dtype == torch.float32)
    except (TypeError, RuntimeError):
        return False


def adapter_first(device: torch.device) -> bool:
    """Whether the adapter's product is written first and the base's is added to it, on a device.

    A GPU's large product reads what it is added to while it computes, so that only the writing is paid for (RunLoRA's
    order "forward 3", arXiv 2312.03415); on CPU the small product is added, and the base's is bit for bit its own.
    """
    return device.type == "cuda"


def sum_of_products(
    rows: Tensor, weight: Tensor | None, bias: Tensor | None, h: Tensor, lora_B: Tensor, factor: float
) -> Tensor:
    """Return ``x W^T + b + factor * h B^T``, ``[T, out]``, in a buffer that nobody else has seen."""
    B = lora_B.to(rows.dtype).t()
    if weight is None:
        return scaled_mm(h, B, factor)
    if adapter_first(rows.device):
        y = scaled_mm(h, B, factor) if bias is None else torch.addmm(bias, h, B, alpha=factor)
        return y.addmm_(rows, weight.t())
    return F.linear(rows, weight, bias).addmm_(h, B, alpha=factor)


def grad_input(
    products: Sequence[tuple[Tensor, Tensor]], v: Tensor, lora_A: Tensor, factor: float, kept: Tensor | None
) -> Tensor:
    """Return ``sum_i dy_i W_i + factor * kept * (v A)``, ``[T, in]``, accumulated in one buffer.

    Args:
        products: ``dy_i`` ``[T, out_i]`` and ``W_i`` ``[out_i, in]``; none for an adapter alone.
        v: ``[T, r]``, what reaches the adapters' inner side.
    """
    A = lora_A.to(v.dtype)
    if products and kept is None and not adapter_first(v.device):
        (grad, weight), *products = products
        total = torch.mm(grad, weight)
        for grad, weight in products:
            total.addmm_(grad, weight)
        return total.addmm_(v, A, alpha=factor)
    total = scaled_mm(v, A, factor)
    if kept is not None:
        total.mul_(kept)
    for grad, weight in products:
        total.addmm_(grad, weight)
    return total


def grad_of_B(h: Tensor, grad: Tensor, factor: float, dtype: torch.dtype) -> Tensor:
    """Return ``factor * dy^T h``, ``[out, r]``, with r on the fast side as in :func:`skinny`."""
    if grad.device.type == "cpu":
        return scaled_mm(h.t(), grad, factor, dtype).t()
    return scaled_mm(grad.t(), h, factor, dtype)


def inner_gradients(grads: Sequence[Tensor], factors: Sequence[Tensor]) -> Tensor:
    """Return ``[dy_1 B_1, ..., dy_n B_n]``, ``[T, sum of ranks]``, in the layout of :func:`skinny`.

    Args:
        grads: ``[T, out_i]``.
        factors: B's, ``[out_i, r_i]``.
    """
    factors = [B.to(grad.dtype) for grad, B in zip(grads, factors, strict=True)]
    if len(grads) == 1 or torch.is_grad_enabled():
        parts = [skinny(grad, B.t()) for grad, B in zip(grads, factors, strict=True)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
    first, ranks = grads[0], [B.shape[1] for B in factors]
    if first.device.type == "cpu":
        flat = first.new_empty(sum(ranks), first.shape[0])
        for grad, B, part in zip(grads, factors, flat.split(ranks), strict=True):
            torch.mm(B.t(), grad.t(), out=part)
        return flat.t()
    flat = first.new_empty(first.shape[0], sum(ranks))
    for grad, B, part in zip(grads, factors, flat.split(ranks, dim=1), strict=True):
        torch.mm(grad, B, out=part)
    return flat
