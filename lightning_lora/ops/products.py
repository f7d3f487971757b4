"""The products of adapted linear layers, each in the layout and the order that are fast on its device.

No function changes a tensor that it is given.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_lora.ops.stored import dense_linear, runs_in_onednn

Dense = Callable[[Any, Tensor], Tensor]


def stacked(As: Sequence[Tensor]) -> Tensor:
    """Return the A's one below the other: ``[sum of ranks, in]``."""
    return As[0] if len(As) == 1 else torch.cat(list(As))


def split_by_rank(tensor: Tensor, dim: int, As: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return each layer's part of what is made of all A's."""
    return [tensor] if len(As) == 1 else tensor.split([A.shape[0] for A in As], dim)


def skinny_mm(rows: Tensor, factor: Tensor) -> Tensor:
    """Return ``rows factor^T``, ``[T, r]``, with r on the side of the product where the device is fast.

    CPU libraries are several times faster with the short dimension first, so the result is a transposed view there.
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
    """Return True if products of a narrow dtype can be written in float32 on a device: CUDA, torch 2.8."""
    if device.type != "cuda":
        return False
    probe = torch.ones(16, 16, device=device, dtype=dtype)
    try:
        return bool(torch.mm(probe, probe, out_dtype=torch.float32).dtype == torch.float32)
    except (TypeError, RuntimeError):
        return False


# Device types on which the adapter's product is written first, and the base's is added to it. A GPU's large product
# reads what it is added to while it computes, so that only the writing is paid for (RunLoRA's order "forward 3", arXiv
# 2312.03415). On CPU the small product is added, and the base's is bit for bit its own.
ADAPTER_FIRST = {"cuda"}


def grad_input(
    grads: Sequence[Tensor],
    weights: Sequence[Any],
    v: Tensor,
    A: Tensor,
    factor: float,
    mask: Tensor | None,
    dense: Dense | None,
) -> Tensor:
    """Return ``sum_i dy_i W_i + factor * mask * (v A)``, ``[T, in]``, accumulated in one buffer.

    Args:
        v: ``[T, sum of ranks]``, the gradient of h without the factor.
        A: ``[sum of ranks, in]``.
    """
    products = [(grad, weight) for grad, weight in zip(grads, weights, strict=True) if weight is not None]
    adds_adapter_last = products and mask is None and v.device.type not in ADAPTER_FIRST
    if adds_adapter_last:
        total = plus_base_gradient(None, *products.pop(0), dense)
    else:
        total = scaled_mm(v, A, factor)
        if mask is not None:
            total.mul_(mask)
    for grad, weight in products:
        plus_base_gradient(total, grad, weight, dense)
    return total.addmm_(v, A, alpha=factor) if adds_adapter_last else total


def plus_base_gradient(total: Tensor | None, grad: Tensor, weight: Any, dense: Dense | None) -> Tensor:
    """Return ``total + dy W``, ``[T, in]``, written into ``total`` if there is one."""
    if dense is None:
        return torch.mm(grad, weight) if total is None else total.addmm_(grad, weight)
    weight = dense(weight, grad)
    if total is None:
        return dense_linear(grad, weight.t())
    return total.add_(dense_linear(grad, weight.t())) if runs_in_onednn(grad) else total.addmm_(grad, weight)


def grad_of_B(h: Tensor, grad: Tensor, factor: float, dtype: torch.dtype) -> Tensor:
    """Return ``factor * dy^T h``, ``[out, r]``, with r on the fast side as in :func:`skinny_mm`."""
    if grad.device.type == "cpu":
        return scaled_mm(h.t(), grad, factor, dtype).t()
    return scaled_mm(grad.t(), h, factor, dtype)


def inner_gradients(grads: Sequence[Tensor], factors: Sequence[Tensor]) -> Tensor:
    """Return ``[dy_1 B_1, ..., dy_n B_n]``, ``[T, sum of ranks]``, in the layout of :func:`skinny_mm`.

    Args:
        grads: ``[T, out_i]``.
        factors: B's, ``[out_i, r_i]``.
    """
    first, factors = grads[0], [B.to(grads[0].dtype) for B in factors]
    if len(grads) == 1:
        return skinny_mm(first, factors[0].t())
    if torch.is_grad_enabled() or torch.compiler.is_compiling():  # neither takes out= of a part of a tensor
        return torch.cat([skinny_mm(grad, B.t()) for grad, B in zip(grads, factors, strict=True)], dim=1)
    ranks = [B.shape[1] for B in factors]
    on_cpu = first.device.type == "cpu"
    v = first.new_empty(sum(ranks), first.shape[0]).t() if on_cpu else first.new_empty(first.shape[0], sum(ranks))
    for grad, B, part in zip(grads, factors, v.split(ranks, dim=1), strict=True):
        torch.mm(grad, B, out=part)
    return v
