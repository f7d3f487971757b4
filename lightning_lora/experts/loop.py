"""The products of all experts one expert at a time, in slices of shared buffers: CPU, and dtypes that no kernel groups.

An expert's rows and weights stay in the cache while its products run, and r comes first in the products of rank r, as
in :func:`lightning_lora.products.skinny`. Experts without rows cost nothing.
"""

from collections.abc import Iterable
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from lightning_lora.experts.groups import Groups
from lightning_lora.experts.stacks import Gradients, Stack


def forward(rows: Tensor, groups: Groups, stack: Stack) -> tuple[Tensor, Tensor | None]:
    """Return ``y = x W_e^T + scaling * u B_e^T``, ``[S, out]``, and ``u = x A_e^T``, kept as ``[r, S]``."""
    W, A, B, factor = stack.weight, stack.lora_A, stack.lora_B, stack.scaling
    dtype = rows.dtype
    y = rows.new_empty(rows.shape[0], W.shape[1])
    u = None if A is None else rows.new_empty(A.shape[1], rows.shape[0])
    for x, x_t, w_t, out, h, h_t, a, b_t in zip(
        _rows(groups, rows),
        _columns(groups, rows.t()),
        _weights(groups, W.mT, dtype),
        _rows(groups, y),
        _columns(groups, u),
        _rows(groups, None if u is None else u.t()),
        _matrices(groups, None if A is None else A.to(dtype)),
        _matrices(groups, None if B is None else B.to(dtype).mT),
        strict=False,
    ):
        torch.mm(x, w_t, out=out)
        if h is not None:
            torch.mm(a, x_t, out=h)
            out.addmm_(h_t, b_t, alpha=factor)
    return y, u


def backward(
    grad: Tensor, rows: Tensor, u: Tensor | None, groups: Groups, stack: Stack, needs: tuple[bool, bool, bool]
) -> Gradients:
    """Return the gradients of ``rows``, A and B, those that are in ``needs``, from the one of ``y``, ``[S, out]``."""
    need_x, need_A, need_B = needs
    A, B, factor = stack.lora_A, stack.lora_B, stack.scaling
    dtype = grad.dtype
    v = grad.new_empty(A.shape[1], grad.shape[0]) if A is not None and (need_x or need_A) else None
    dx = torch.empty_like(rows) if need_x else None
    dA = _zeros(groups, grad, A.shape) if A is not None and need_A else None
    dB = _zeros(groups, grad, B.mT.shape) if B is not None and need_B else None
    for g, g_t, x, to_x, w, h, v_e, v_t, a, b_t, to_A, to_B in zip(
        _rows(groups, grad),
        _columns(groups, grad.t()),
        _rows(groups, rows),
        _rows(groups, dx),
        _weights(groups, stack.weight, dtype),
        _columns(groups, u),
        _columns(groups, v),
        _rows(groups, None if v is None else v.t()),
        _matrices(groups, None if A is None else A.to(dtype)),
        _matrices(groups, None if B is None else B.to(dtype).mT),
        _matrices(groups, dA),
        _matrices(groups, dB),
        strict=False,
    ):
        if v_e is not None:
            torch.mm(b_t, g_t, out=v_e)
        if to_x is not None:
            torch.mm(g, w, out=to_x)
            if v_t is not None:
                to_x.addmm_(v_t, a, alpha=factor)
        if to_A is not None:
            to_A.addmm_(v_e, x, beta=0, alpha=factor)
        if to_B is not None:
            to_B.addmm_(h, g, beta=0, alpha=factor)
    return Gradients(
        dx,
        None if A is None or dA is None else dA.to(A.dtype),
        None if B is None or dB is None else dB.to(B.dtype).mT,
    )


def _counts(groups: Groups) -> tuple[int, ...]:
    assert groups.counts is not None
    return groups.counts


def _rows(groups: Groups, tensor: Tensor | None) -> Iterable[Any]:
    """Return the rows of each expert that has some."""
    return repeat(None) if tensor is None else [part for part in tensor.split(_counts(groups)) if part.shape[0]]


def _columns(groups: Groups, tensor: Tensor | None) -> Iterable[Any]:
    """Return the columns of each expert that has some."""
    return repeat(None) if tensor is None else [part for part in tensor.split(_counts(groups), 1) if part.shape[1]]


def _matrices(groups: Groups, stacked: Tensor | None) -> Iterable[Any]:
    """Return the matrix of each expert that has rows."""
    if stacked is None:
        return repeat(None)
    return [part for part, count in zip(stacked.unbind(), _counts(groups), strict=True) if count]


def _weights(groups: Groups, stacked: Tensor, dtype: torch.dtype) -> Iterable[Any]:
    """Return the matrix of each expert that has rows, in another dtype one at a time."""
    parts = _matrices(groups, stacked)
    return parts if stacked.dtype == dtype else (part.to(dtype) for part in parts)


def _zeros(groups: Groups, like: Tensor, shape: torch.Size) -> Tensor:
    """Return where to write the gradients of a factor: zeros where an expert has no rows."""
    return like.new_empty(shape) if all(_counts(groups)) else like.new_zeros(shape)
