"""Cross-entropy of what a frozen linear layer gives, a tile of logits at a time.

    x_rows [n, h] --- W_columns^T, b ---> z [n, c] --- float32 ---> q [n, c] --- W_columns ---> q W_columns [n, h]
                                      the same buffer, for every tile                   + over the vocabulary

The gradient of x is formed beside the loss, while the logits are there; they are not made again, and with a frozen W
nothing else is needed of them. Over the vocabulary the sum is kept relative to the highest logit so far, as in
FlashAttention (arXiv 2205.14135), so that a tile has as many rows as products are fast with, and W is read once for all
of them. Kept is ``u = dloss/dx / sigmoid d`` (see ``parallel_loss.py``), as large as x.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_lora.functional import autocast_dtype
from lightning_lora.parallel_loss import agree, loss_and_weight, place, refuse_create_graph, set_apart
from lightning_lora.products import scaled_mm

_TILE_BYTES = 4 * 2**20  # of all that a tile needs: what is done to it happens in a CPU's cache
# a GPU wants fewer and larger kernels: of the logits, so that all buffers together stay below a twentieth of them; of
# fewer rows at least so many bytes, where memory does not matter yet
_PARTS, _MIN_BYTES = 40, 12 * 2**20
_NUM_ROWS = {"cpu": 512}  # of products that are as fast as any; elsewhere twice as many
_NARROWEST = {torch.float16: 2.0**10}  # a probability of one in 150,000 is there, but hardly


def losses_of_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    softcap: float | None = None,
    group: Any = None,
) -> Tensor:
    """Return ``cross_entropy(cap(x W^T + b), targets)``, ``[T]``, in float32, or float64 where x is.

    Only x gets a gradient. Autocast is followed as in ``F.linear``. Called on all ranks of ``group``; one all-gather
    of ``2 T`` numbers in forward. The gradient of x is then this rank's addend.

    Args:
        x: ``[T, in_features]``
        weight: ``[out_features, in_features]``, frozen; with a group this rank's rows.
        bias: ``[out_features]`` or ``None``, frozen.
        targets: ``[T]``, of the whole vocabulary.
        softcap: logits are ``softcap * tanh(z / softcap)``.
        group: process group whose ranks hold equal parts of the rows, in their order.
    """
    dtype = autocast_dtype(x)
    if dtype is not None and x.dtype != torch.float64:
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    inputs = (x, weight, bias, targets, softcap or None, group)
    if torch.is_grad_enabled() and x.requires_grad:
        losses: Tensor = _LinearCrossEntropy.apply(*inputs)  # type: ignore[no-untyped-call]
    else:
        losses, _, _ = _run(*inputs, wants_gradient=False)
    return losses


class _LinearCrossEntropy(torch.autograd.Function):
    """Losses ``[T]``; for backward, ``u`` ``[T, h]`` and ``sigmoid d`` ``[T]``."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        losses, share, u = _run(*inputs, wants_gradient=True)
        ctx.save_for_backward(share, u)
        return losses

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_create_graph()
        share, u = ctx.saved_tensors
        # u stays: a graph may be gone through twice. The factor is not rounded to u's dtype, in which it may overflow
        grad_x = torch.mul(u, (grad * share)[:, None], out=torch.empty_like(u))
        return grad_x, None, None, None, None, None


def _run(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    softcap: float | None,
    group: Any,
    *,
    wants_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return losses ``[T]``, ``sigmoid d`` ``[T]`` and, if wanted, ``u`` ``[T, h]``."""
    x = x.detach()
    u = torch.empty_like(x) if wants_gradient else None
    with torch.autocast(x.device.type, enabled=False):
        column, here = place(targets, weight.shape[0], group)
        found = _over_tiles(x, _Head(weight, bias, softcap), column, here, u)
        mine = found.highest + found.total.log()
        others, own = (mine, found.own) if group is None else agree(mine, found.own, group)
        losses, share = loss_and_weight(others, own)
        if u is not None:
            of_this_rank = (mine - others.clamp_min(torch.finfo(mine.dtype).min)).exp()  # -inf - -inf would be nan
            _subtract_targets(u, weight, column, of_this_rank, found.slope)
    return losses, share, u


class _Head(NamedTuple):
    weight: Tensor  # [V, h], this rank's
    bias: Tensor | None  # [V]
    softcap: float | None

    def columns(self, first: int, num: int) -> "_Head":
        bias = None if self.bias is None else self.bias[first : first + num]
        return _Head(self.weight[first : first + num], bias, self.softcap)


class _Found(NamedTuple):
    """What is known of rows' logits, ``[T]`` each; exp is of what is left when the highest is subtracted."""

    highest: Tensor  # of the others than the target
    total: Tensor  # sum of their exp
    own: Tensor  # the target's, 0 where it is another rank's
    slope: Tensor  # the cap's, at the target

    def rows(self, rows: slice) -> "_Found":
        return _Found(*(values[rows] for values in self))


def _over_tiles(x: Tensor, head: _Head, column: Tensor, here: Tensor, product: Tensor | None) -> _Found:
    """Return what is found of all rows, and write ``q W`` to ``product`` ``[T, h]``, if any."""
    wide = torch.promote_types(x.dtype, torch.float32)
    num_rows, num_columns = _tile(x, head.weight.shape[0], head.softcap)
    logits = x.new_empty(num_rows, num_columns)
    buffers = [logits] if wide == x.dtype else [logits, logits.new_empty(logits.shape, dtype=wide)]
    found = _Found(*x.new_zeros(4, x.shape[0], dtype=wide))
    found.highest.fill_(torch.finfo(wide).min)  # not -inf, of which the difference to itself is nan
    for start in range(0, x.shape[0], num_rows):
        rows = slice(start, start + num_rows)
        part = x[rows]
        into = None if product is None else part.new_zeros(part.shape, dtype=wide)  # summed in it, and rounded once
        for first in range(0, head.weight.shape[0], num_columns):
            columns = head.columns(first, num_columns)
            at, inside = place(column[rows] - first, columns.weight.shape[0], None)
            _add_tile(part, columns, at, inside & here[rows], buffers, found.rows(rows), into)
        if product is not None and into is not None:
            torch.div(into, found.total[rows, None].clamp_min(1.0), out=into)  # of the highest alone it is 1
            product[rows] = into
    return found


def _add_tile(
    x: Tensor,
    head: _Head,
    column: Tensor,
    here: Tensor,
    buffers: list[Tensor],
    found: _Found,
    product: Tensor | None,
) -> None:
    """Add one tile's logits to what is found of its rows, and their exp times W to ``product`` ``[n, h]``, if any."""
    shape = x.shape[0], head.weight.shape[0]
    narrow, z = (buffer.flatten()[: math.prod(shape)].view(shape) for buffer in (buffers[0], buffers[-1]))
    if head.bias is None:
        torch.mm(x, head.weight.t(), out=narrow)
    else:
        torch.addmm(head.bias, x, head.weight.t(), out=narrow)
    if len(buffers) > 1:
        z.copy_(narrow)
    slope = _cap(z, head.softcap) if head.softcap else None
    at_target = here.to(z.dtype) if slope is None else slope.gather(1, column[:, None])[:, 0] * here
    highest, total, own = set_apart(z, column, here)
    new = torch.maximum(found.highest, highest)
    kept, added = (found.highest - new).exp_(), (highest - new).exp_().mul_(total)
    found.highest.copy_(new)
    found.total.mul_(kept).add_(added)
    found.own.add_(own)
    found.slope.add_(at_target)
    if product is None:
        return
    factor = _NARROWEST.get(x.dtype, 1.0)
    z.mul_((factor / total.clamp_min(1.0))[:, None])  # q of the tile alone, which no dtype is too narrow for
    if slope is not None:
        z.mul_(slope)
    if len(buffers) > 1:
        narrow.copy_(z)
    of_tile = scaled_mm(narrow, head.weight, 1 / factor, product.dtype)
    product.mul_(kept[:, None]).addcmul_(of_tile, added[:, None])


def _cap(z: Tensor, softcap: float) -> Tensor:
    """Cap logits ``z`` in place and return the slope, ``[n, V]``, with which they change."""
    slope = torch.addcmul(z.new_ones(()), z.div_(softcap).tanh_(), z, value=-1)
    z.mul_(softcap)
    return slope


def _subtract_targets(u: Tensor, weight: Tensor, column: Tensor, of_this_rank: Tensor, at_target: Tensor) -> None:
    """Turn ``q W`` ``[T, h]``, of this rank's part, into ``of_this_rank * q W - at_target * W[target]`` in place."""
    rows = max(1, u.shape[0] // _PARTS)
    pieces = (tensor.split(rows) for tensor in (u, column, of_this_rank[:, None], at_target[:, None]))
    for part, which, share, slope in zip(*pieces, strict=True):
        part.copy_((part * share).addcmul_(weight[which], slope, value=-1))


def _tile(x: Tensor, size: int, softcap: float | None) -> tuple[int, int]:
    """Return how many rows and how many columns of the logits exist at once."""
    narrow = x.element_size()
    wide = max(narrow, 4)
    width = (narrow if narrow < wide else 0) + wide * (2 if softcap else 1)  # bytes, with the copies of a logit
    limit = _TILE_BYTES if x.device.type == "cpu" else max(x.shape[0] * size * narrow // _PARTS, _MIN_BYTES)
    num_rows = _even(x.shape[0], _NUM_ROWS.get(x.device.type, 1024))
    return num_rows, _even(size, limit // (width * num_rows))


def _even(num: int, most: int) -> int:
    """Return the size of about equal parts of ``num``, none much above ``most``, in eights for tensor cores."""
    return 8 * math.ceil(num / max(math.ceil(num / max(most, 1)), 1) / 8) or 8
