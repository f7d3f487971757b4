"""The products of all experts one expert at a time, in slices of shared buffers: CPU, and dtypes that no kernel groups.

An expert's rows and weights stay in the cache while its products run, tokens are gathered an expert at a time, and r
comes first in the products of rank r, as in :func:`skinny`. Experts without rows cost nothing.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import compress, repeat
from typing import Any

import torch
from torch import Tensor

from lightning_lora.ops.experts.groups import Groups
from lightning_lora.ops.experts.stacks import Gradients, Stack


class Spread:
    """Each row's token, ``[S, n]``, without all of them at once: those of one expert lie in a buffer until the next's.

    Args:
        tokens: ``[T, n]``
    """

    def __init__(self, tokens: Tensor, groups: Groups) -> None:
        self.tokens = tokens
        self.which = groups.tokens()  # [S]
        self.shape = torch.Size((len(self.which), tokens.shape[1]))
        self.dtype = tokens.dtype

    def by_expert(self, counts: tuple[int, ...]) -> Iterator[Tensor]:
        """Return the rows of each expert that has some."""
        buffer = self.tokens.new_empty(max(counts, default=0), self.shape[1])
        for which, count in zip(self.which.split(counts), counts, strict=True):
            if count:
                yield torch.index_select(self.tokens, 0, which, out=buffer[:count])


def spread(tokens: Tensor, groups: Groups) -> Spread:
    """Return what :func:`forward` and :func:`backward` take for each row's token."""
    return Spread(tokens, groups)


def forward(rows: Tensor | Spread, groups: Groups, stack: Stack) -> tuple[Tensor, Tensor | None]:
    """Return ``y = x W_e^T + scaling * u B_e^T``, ``[S, out]``, and ``u = x A_e^T``, kept as ``[r, S]``."""
    W, A, B, factor = stack.weight, stack.lora_A, stack.lora_B, stack.scaling
    num_rows, dtype = rows.shape[0], rows.dtype
    y = W.new_empty(num_rows, W.shape[1], dtype=dtype)
    u = None if A is None else W.new_empty(A.shape[1], num_rows, dtype=dtype)
    for x, w_t, out, h, h_t, a, b_t in zip(
        _rows(groups, rows),
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
            torch.mm(a, x.t(), out=h)
            out.addmm_(h_t, b_t, alpha=factor)
    return y, u


def backward(
    grad: Tensor | Spread,
    rows: Tensor | Spread,
    u: Tensor | None,
    groups: Groups,
    stack: Stack,
    needs: tuple[bool, bool, bool],
    factors: Tensor | None,
) -> Gradients:
    """Return the gradients of what was multiplied, of A and B, those that are in ``needs``.

    Args:
        grad: of ``y``, ``[S, out]``.
        rows: ``[S, in]``; ``factors`` ``[S, 1]``, if any, times these were multiplied.
    """
    need_x, need_A, need_B = needs
    W, A, B, factor = stack.weight, stack.lora_A, stack.lora_B, stack.scaling
    num_rows, dtype = grad.shape[0], grad.dtype
    like = W.new_empty(0, dtype=dtype)
    v = like.new_empty(A.shape[1], num_rows) if A is not None and (need_x or need_A) else None
    dx = like.new_empty(rows.shape) if need_x else None
    dA = _zeros(groups, like, A.shape) if A is not None and need_A else None
    dB = _zeros(groups, like, B.mT.shape) if B is not None and need_B else None
    for g, x, to_x, w, h, v_e, v_t, factor_e, a, b_t, to_A, to_B in zip(
        _rows(groups, grad),
        _rows(groups, rows) if dA is not None else repeat(None),
        _rows(groups, dx),
        _weights(groups, W, dtype),
        _columns(groups, u),
        _columns(groups, v),
        _rows(groups, None if v is None else v.t()),
        _columns(groups, None if factors is None else factors.t()),
        _matrices(groups, None if A is None else A.to(dtype)),
        _matrices(groups, None if B is None else B.to(dtype).mT),
        _matrices(groups, dA),
        _matrices(groups, dB),
        strict=False,
    ):
        if v_e is not None:
            torch.mm(b_t, g.t(), out=v_e)
        if to_x is not None:
            torch.mm(g, w, out=to_x)
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


def _counts(groups: Groups) -> tuple[int, ...]:
    assert groups.counts is not None
    return groups.counts


def _rows(groups: Groups, tensor: Tensor | Spread | None) -> Iterable[Any]:
    """Return the rows of each expert that has some."""
    if isinstance(tensor, Spread):
        return tensor.by_expert(_counts(groups))
    return repeat(None) if tensor is None else _with_rows(groups, tensor.split(_counts(groups)))


def _columns(groups: Groups, tensor: Tensor | None) -> Iterable[Any]:
    """Return the columns of each expert that has some."""
    return repeat(None) if tensor is None else _with_rows(groups, tensor.split(_counts(groups), 1))


def _matrices(groups: Groups, stacked: Tensor | None) -> Iterable[Any]:
    """Return the matrix of each expert that has rows."""
    return repeat(None) if stacked is None else _with_rows(groups, stacked.unbind())


def _with_rows(groups: Groups, parts: Sequence[Tensor]) -> Iterable[Tensor]:
    """Return those that belong to experts that have rows."""
    counts = _counts(groups)
    return parts if all(counts) else compress(parts, counts)


def _weights(groups: Groups, stacked: Tensor, dtype: torch.dtype) -> Iterable[Any]:
    """Return the matrix of each expert that has rows, in another dtype one at a time."""
    parts = _matrices(groups, stacked)
    return parts if stacked.dtype == dtype else (part.to(dtype) for part in parts)


def _zeros(groups: Groups, like: Tensor, shape: torch.Size) -> Tensor:
    """Return where to write the gradients of a factor: zeros where an expert has no rows."""
    return like.new_empty(shape) if all(_counts(groups)) else like.new_zeros(shape)
