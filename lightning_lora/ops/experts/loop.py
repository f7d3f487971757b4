"""Multiply one expert at a time, in slices of shared buffers: for CPU, and for dtypes that no grouped kernel takes.

An expert's rows and weights stay in the cache while its products run, tokens are gathered an expert at a time, and r
comes first in the products of rank r, as in
:func:`~lightning_lora.ops.linear.skinny_mm`. Experts without rows cost nothing. A packed matrix is made dense for its
product alone.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import compress, repeat
from typing import Any

import torch
from torch import Tensor

from lightning_lora.ops.experts.records import ExpertWeights, Gradients, Groups
from lightning_lora.ops.packed_stack import PackedStack
from lightning_lora.ops.stored import dense_like


class DispatchedRows:
    """Each row's token, ``[S, n]``, in a buffer that holds the rows of one expert at a time.

    Args:
        tokens: ``[T, n]``
    """

    def __init__(self, tokens: Tensor, groups: Groups) -> None:
        self.tokens = tokens
        self.which = groups.tokens()  # [S]
        self.shape = torch.Size((len(self.which), tokens.shape[1]))
        self.dtype = tokens.dtype

    def by_expert(self, counts: Sequence[int]) -> Iterator[Tensor]:
        """Return the rows of each expert that has some."""
        buffer = self.tokens.new_empty(max(counts, default=0), self.shape[1])
        for which, count in zip(self.which.split(counts), counts, strict=True):
            if count:
                yield torch.index_select(self.tokens, 0, which, out=buffer[:count])


def dispatch(tokens: Tensor, groups: Groups) -> DispatchedRows:
    """Return what :func:`forward` and :func:`backward` take for each row's token."""
    return DispatchedRows(tokens, groups)


def forward(rows: Tensor | DispatchedRows, groups: Groups, layer: ExpertWeights) -> tuple[Tensor, Tensor | None]:
    """Return ``y = x W_e^T + scaling * u B_e^T``, ``[S, out]``, and ``u = x A_e^T``, kept as ``[r, S]``."""
    counts: Any = groups.counts
    W, A, B, factor = layer.weight, layer.lora_A, layer.lora_B, layer.scaling
    num_rows, dtype = rows.shape[0], rows.dtype
    y = torch.empty(num_rows, W.shape[1], dtype=dtype, device=W.device)
    u = None if A is None else y.new_empty(A.shape[1], num_rows)
    for x, w_t, out, h, h_t, a, b_t in zip(
        _rows(counts, rows),
        _matrices(counts, W.mT),
        _rows(counts, y),
        _columns(counts, u),
        _rows(counts, None if u is None else u.t()),
        _matrices(counts, None if A is None else A.to(dtype)),
        _matrices(counts, None if B is None else B.to(dtype).mT),
        strict=False,
    ):
        torch.mm(x, dense_like(w_t, x), out=out)
        if h is not None:
            torch.mm(a, x.t(), out=h)
            out.addmm_(h_t, b_t, alpha=factor)
    return y, u


def backward(
    grad: Tensor | DispatchedRows,
    rows: Tensor | DispatchedRows,
    u: Tensor | None,
    groups: Groups,
    layer: ExpertWeights,
    needs: tuple[bool, bool, bool],
    factors: Tensor | None,
) -> Gradients:
    """Return the gradients of the rows, of A and of B, as far as ``needs`` asks for them.

    Args:
        grad: of ``y``, ``[S, out]``.
        rows: ``[S, in]``; forward multiplied them by ``factors`` ``[S, 1]`` first, if there are any.
    """
    need_x, need_A, need_B = needs
    counts: Any = groups.counts
    W, A, B, factor = layer.weight, layer.lora_A, layer.lora_B, layer.scaling
    num_rows, dtype = grad.shape[0], grad.dtype
    like = torch.empty(0, dtype=dtype, device=W.device)
    v = like.new_empty(A.shape[1], num_rows) if A is not None and (need_x or need_A) else None
    dx = like.new_empty(rows.shape) if need_x else None
    dA = _zeros(counts, like, A.shape) if A is not None and need_A else None
    dB = _zeros(counts, like, B.mT.shape) if B is not None and need_B else None
    for g, x, to_x, w, h, v_e, v_t, factor_e, a, b_t, to_A, to_B in zip(
        _rows(counts, grad),
        _rows(counts, rows) if dA is not None else repeat(None),
        _rows(counts, dx),
        _matrices(counts, W),
        _columns(counts, u),
        _columns(counts, v),
        _rows(counts, None if v is None else v.t()),
        _columns(counts, None if factors is None else factors.t()),
        _matrices(counts, None if A is None else A.to(dtype)),
        _matrices(counts, None if B is None else B.to(dtype).mT),
        _matrices(counts, dA),
        _matrices(counts, dB),
        strict=False,
    ):
        if v_e is not None:
            torch.mm(b_t, g.t(), out=v_e)
        if to_x is not None:
            torch.mm(g, dense_like(w, g), out=to_x)
            if v_t is not None:
                to_x.addmm_(v_t, a, alpha=factor)
        if to_A is not None:
            if factor_e is not None:
                v_e.mul_(factor_e)
            to_A.addmm_(v_e, x, beta=0, alpha=factor)
        if to_B is not None:
            to_B.addmm_(h, g, beta=0, alpha=factor)
    return Gradients(
        dx,
        None if A is None or dA is None else dA.to(A.dtype),
        None if B is None or dB is None else dB.to(B.dtype).mT,
    )


def _rows(counts: Sequence[int], tensor: Tensor | DispatchedRows | None) -> Iterable[Any]:
    """Return the rows of each expert that has some."""
    if isinstance(tensor, DispatchedRows):
        return tensor.by_expert(counts)
    return repeat(None) if tensor is None else _with_rows(counts, tensor.split(counts))


def _columns(counts: Sequence[int], tensor: Tensor | None) -> Iterable[Any]:
    """Return the columns of each expert that has some."""
    return repeat(None) if tensor is None else _with_rows(counts, tensor.split(counts, 1))


def _matrices(counts: Sequence[int], stacked: Tensor | PackedStack | None) -> Iterable[Any]:
    """Return the matrix of each expert that has rows."""
    return repeat(None) if stacked is None else _with_rows(counts, stacked.unbind())


def _with_rows(counts: Sequence[int], parts: Sequence[Any]) -> Iterable[Any]:
    """Return those that belong to experts that have rows."""
    return parts if all(counts) else compress(parts, counts)


def _zeros(counts: Sequence[int], like: Tensor, shape: torch.Size) -> Tensor:
    """Return where to write the gradients of a factor: zeros where an expert has no rows."""
    return like.new_empty(shape) if all(counts) else like.new_zeros(shape)
