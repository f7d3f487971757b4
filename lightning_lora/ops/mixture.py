"""Linear layers on tensors where several adapters each act on rows of their own.

x [T, in] --+-- W_1 [out_1, in] frozen, once for all rows -----------+ --> y_1 [T, out_1]
            |                                                        |
            +-- the rows of a -- A_1a -- B_1a * scaling of a --------+  on these rows
            +-- the rows of b -- A_1b -- B_1b * scaling of b --------+

The tensors keep the layout of :mod:`lightning_lora.ops.linear`, four for each layer: first come the base layers, which
have no factors, then the factors of each share, which have no weight. No adapter's factors are copied.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lora.ops.linear_tensors import LinearTensors, ScaledDropout
from lightning_lora.ops.products import (
    Dense,
    grad_of_B,
    inner_gradients,
    plus_base_gradient,
    scaled_mm,
    skinny_mm,
    split_by_rank,
    stacked,
)
from lightning_lora.ops.stored import dense_like, dense_linear

Rows = slice | Tensor  # of x [T, in]: one run of rows, or their indices


class Share(NamedTuple):
    """The rows on which one adapter acts, and the layers, by their places, that it adapts with one scaling."""

    rows: Rows
    layers: tuple[int, ...]
    settings: ScaledDropout  # without the seed
    drops: bool = False

    def take(self, tensor: Tensor) -> Tensor:
        """Return this share's rows of ``tensor``: a view of one run, else a copy."""
        return tensor[self.rows] if isinstance(self.rows, slice) else tensor.index_select(0, self.rows)

    def add_product(self, total: Tensor, left: Tensor, right: Tensor, factor: float) -> None:
        """Add ``factor * left right`` to this share's rows of ``total``, in place."""
        if isinstance(self.rows, slice):
            total[self.rows].addmm_(left, right, alpha=factor)
        else:
            total.index_add_(0, self.rows, scaled_mm(left, right, factor))


class Shares(NamedTuple):
    """What the adapters of a mixture do to one input: takes the place of one adapter's :class:`ScaledDropout`."""

    shares: tuple[Share, ...]
    num_layers: int
    seed: Tensor | None = None  # [number of shares], if any of them drops entries
    has_stored: bool = False

    def parts(self, tensors: Sequence[Any]) -> Iterator[tuple[int, Share, ScaledDropout, Sequence[Any]]]:
        """Yield for each share where its factors begin in ``tensors``, its settings with the seed, and its factors."""
        start = 4 * self.num_layers
        for i, share in enumerate(self.shares):
            stop = start + 4 * len(share.layers)
            seed = self.seed[i] if share.drops and self.seed is not None else None
            yield start, share, share.settings._replace(seed=seed), tensors[start:stop]
            start = stop


def forward_of_mixture(
    rows: Tensor, tensors: Sequence[Any], settings: Shares, dense: Dense | None = None
) -> tuple[list[Tensor], Tensor]:
    """Return the outputs ``[T, out_i]`` of the base layers with each share's terms, and the h's of all shares, flat.

    Arguments as in :func:`~lightning_lora.ops.linear.forward_of_linears`.
    """
    outputs = []
    for weight, bias in zip(*_base(tensors, settings), strict=True):
        if dense is not None:
            weight, bias = dense(weight, rows), None if bias is None else bias.to(rows.dtype)
        outputs.append((F.linear if dense is None else dense_linear)(rows, weight, bias))
    saved = [rows.new_empty(0)]
    for _, share, own, factors in settings.parts(tensors):
        As, Bs = factors[2::4], factors[3::4]
        h = skinny_mm(_entering(share.take(rows), own), stacked(As).to(rows.dtype))
        for layer, B, part in zip(share.layers, Bs, split_by_rank(h, 1, As), strict=True):
            share.add_product(outputs[layer], part, B.to(rows.dtype).t(), own.factor)
        saved.append(h.t().reshape(-1))
    return outputs, torch.cat(saved)


def backward_of_mixture(
    rows: Any,
    grads: Sequence[Tensor | None],
    tensors: Sequence[Any],
    h: Tensor | None,
    settings: Shares,
    needs: Sequence[bool],
    *,
    need_x: bool,
    dense: Dense | None = None,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Return the gradient of x, ``[T, in]``, and the gradients of all ``tensors``.

    Arguments as in :func:`~lightning_lora.ops.linear.backward_of_linears`.
    """
    found: list[Tensor | None] = [None] * len(tensors)
    used = [i for i, grad in enumerate(grads) if grad is not None]
    if not used:
        return None, found
    grad_x: Tensor | None = None
    for i in used:
        grad: Any = grads[i]
        found[4 * i] = torch.mm(grad.t(), rows) if needs[4 * i] else None
        found[4 * i + 1] = grad.sum(0) if needs[4 * i + 1] else None
        if need_x:
            grad_x = plus_base_gradient(grad_x, grad, tensors[4 * i], dense)
    done = 0
    for start, share, own, factors in settings.parts(tensors):
        stop = start + len(factors)
        own_rows = None if rows is None else share.take(rows)
        first: Any = grads[used[0]]
        num_rows, r = share.take(first).shape[0], sum(A.shape[0] for A in factors[2::4])
        own_h = None if h is None else h[done : done + num_rows * r].view(r, num_rows).t()
        done += num_rows * r
        found[start:stop] = _backward_of_share(share, own, own_rows, grads, factors, own_h, needs[start:stop], grad_x)
    return grad_x, found


def _backward_of_share(
    share: Share,
    own: ScaledDropout,
    rows: Any,
    grads: Sequence[Tensor | None],
    factors: Sequence[Any],
    h: Tensor | None,
    needs: Sequence[bool],
    grad_x: Tensor | None,
) -> list[Tensor | None]:
    """Return the gradients of one share's factors, and add its part to the gradient of x, in place."""
    found: list[Tensor | None] = [None] * len(factors)
    used = [i for i, layer in enumerate(share.layers) if grads[layer] is not None]
    if not used:
        return found
    given = [share.take(grads[share.layers[i]]) for i in used]  # type: ignore[arg-type]  # those that are not None
    As, Bs = [factors[4 * i + 2] for i in used], [factors[4 * i + 3] for i in used]
    need_A, need_B = any(needs[2::4]), any(needs[3::4])
    mask = None if own.seed is None else own.mask(given[0], As[0].shape[1])
    recomputes_h = need_B and torch.is_grad_enabled()  # for a second derivative: the saved h is a constant to autograd
    entering = rows * mask if mask is not None and (need_A or recomputes_h) else rows
    grads_A: Sequence[Any] = used
    if need_A or grad_x is not None:
        v = inner_gradients(given, Bs)  # [rows of the share, sum of ranks]
        if grad_x is not None and mask is None:
            share.add_product(grad_x, v, stacked(As).to(v.dtype), own.factor)
        elif grad_x is not None and mask is not None:
            _add(share, grad_x, scaled_mm(v, stacked(As).to(v.dtype), own.factor) * mask)
        if need_A:
            grads_A = split_by_rank(scaled_mm(v.t(), entering, own.factor, As[0].dtype), 0, As)
    if recomputes_h:
        h = skinny_mm(entering, stacked(factors[2::4]).to(entering.dtype))
    parts: Any = h if h is None else split_by_rank(h, 1, factors[2::4])
    for i, grad, grad_A in zip(used, given, grads_A, strict=True):
        found[4 * i + 2] = grad_A if needs[4 * i + 2] else None
        if needs[4 * i + 3]:
            found[4 * i + 3] = grad_of_B(parts[i], grad, own.factor, factors[4 * i + 3].dtype)
    return found


def plain_mixture(x: Tensor, layers: Sequence[LinearTensors], settings: Shares) -> list[Tensor]:
    """Return the outputs by operations that torch can transform."""
    tensors: list[Any] = [tensor for layer in layers for tensor in layer]
    rows = x.reshape(-1, x.shape[-1])
    outputs = []
    for weight, bias in zip(*_base(tensors, settings), strict=True):
        if layers[0].is_stored:
            weight, bias = dense_like(weight, x), None if bias is None else bias.to(x.dtype)
        outputs.append(F.linear(rows, weight, bias))
    for _, share, own, factors in settings.parts(tensors):
        entering = _entering(share.take(rows), own)
        for layer, A, B in zip(share.layers, factors[2::4], factors[3::4], strict=True):
            term = F.linear(F.linear(entering, A.to(x.dtype)) * own.factor, B.to(x.dtype))
            outputs[layer] = outputs[layer].index_add(0, _index(share.rows, rows), term)
    return [y.view(*x.shape[:-1], y.shape[-1]) for y in outputs]


def _base(tensors: Sequence[Any], settings: Shares) -> tuple[Sequence[Any], Sequence[Any]]:
    """Return the weights and the biases of the base layers."""
    base = tensors[: 4 * settings.num_layers]
    return base[::4], base[1::4]


def _entering(rows: Tensor, own: ScaledDropout) -> Tensor:
    return rows if own.seed is None else rows * own.mask(rows, rows.shape[1])


def _add(share: Share, total: Tensor, value: Tensor) -> None:
    if isinstance(share.rows, slice):
        total[share.rows].add_(value)
    else:
        total.index_add_(0, share.rows, value)


def _index(rows: Rows, like: Tensor) -> Tensor:
    if isinstance(rows, Tensor):
        return rows
    return torch.arange(like.shape[0], device=like.device)[rows]
