"""Statistics of the logits of a frozen linear layer, and their softmax's product with W, a tile at a time.

    x_rows [n, h] --- W_columns^T, b ---> z [n, c] --- float32 ---> q [n, c] --- W_columns ---> q W_columns [n, h]
                                      the same buffer, for every tile                   + over the vocabulary

Sums over the vocabulary are kept relative to the highest logit so far, as in FlashAttention (arXiv 2205.14135), so that
a tile can have as many rows as products are fast with, and W is read once for all of them. The target is not in q.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_lora.ops.cross_entropy.parallel import place, set_apart
from lightning_lora.ops.products import scaled_mm

_TILE_BYTES = 4 * 2**20  # of all that a tile needs: what is done to it happens in a CPU's cache
# a GPU wants fewer and larger kernels: of the logits, so that all buffers together stay below a twentieth of them; of
# fewer rows at least so many bytes, where memory does not matter yet
_PARTS, _MIN_BYTES = 40, 12 * 2**20
_NUM_ROWS = {"cpu": 512}  # of products that are as fast as any; elsewhere twice as many
_NARROWEST = {torch.float16: 2.0**10}  # a probability of one in 150,000 is there, but hardly


class Head(NamedTuple):
    """A frozen linear layer, whose output is kept within ``softcap * tanh(z / softcap)``, if given."""

    weight: Tensor  # [V, h], this rank's
    bias: Tensor | None  # [V]
    softcap: float | None

    def columns(self, first: int, num: int) -> "Head":
        bias = None if self.bias is None else self.bias[first : first + num]
        return Head(self.weight[first : first + num], bias, self.softcap)


class Found(NamedTuple):
    """What is known of rows' logits, ``[T]`` each; exp is of what is left when the highest is subtracted."""

    highest: Tensor  # of the others than the target
    total: Tensor  # sum of their exp
    own: Tensor  # the target's, 0 where it is another rank's
    slope: Tensor  # the cap's, at the target

    def rows(self, rows: slice) -> "Found":
        return Found(*(values[rows] for values in self))


def over_tiles(x: Tensor, head: Head, column: Tensor, here: Tensor, product: Tensor | None) -> Found:
    """Return what is found of all rows, and write ``q W`` to ``product`` ``[T, h]``, if any."""
    wide = torch.promote_types(x.dtype, torch.float32)
    num_rows, num_columns = _tile(x, head.weight.shape[0], head.softcap)
    logits = x.new_empty(num_rows, num_columns)
    buffers = [logits] if wide == x.dtype else [logits, logits.new_empty(logits.shape, dtype=wide)]
    found = Found(*x.new_zeros(4, x.shape[0], dtype=wide))
    found.highest.fill_(-torch.inf)  # a tile's is finite: the difference is never nan
    for start in range(0, x.shape[0], num_rows):
        rows = slice(start, start + num_rows)
        part = x[rows]
        into = None if product is None else part.new_zeros(part.shape, dtype=wide)  # summed in it, and rounded once
        for first in range(0, head.weight.shape[0], num_columns):
            columns = head.columns(first, num_columns)
            at, inside = place(column[rows] - first, columns.weight.shape[0], None)
            _add_tile(part, columns, at, inside & here[rows], buffers, found.rows(rows), into)
        if product is not None and into is not None:
            product[rows] = into.div_(found.total[rows, None].clamp_min(1.0))  # exp of the highest is in it, which is 1
    return found


def _add_tile(
    x: Tensor,
    head: Head,
    column: Tensor,
    here: Tensor,
    buffers: list[Tensor],
    found: Found,
    product: Tensor | None,
) -> None:
    """Add one tile's logits to what is found of its rows, and their exp times W to ``product`` ``[n, h]``, if any."""
    narrow, z = _logits(x, head, buffers)
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
    if narrow is not z:
        narrow.copy_(z)
    of_tile = scaled_mm(narrow, head.weight, 1 / factor, product.dtype)
    product.mul_(kept[:, None]).addcmul_(of_tile, added[:, None])


def _logits(x: Tensor, head: Head, buffers: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return ``x W^T + b`` ``[n, c]``, at the beginning of the buffers: in the dtype of x, and in float32 or wider."""
    shape = x.shape[0], head.weight.shape[0]
    narrow, *wide = (buffer.flatten()[: math.prod(shape)].view(shape) for buffer in buffers)
    if head.bias is None:
        torch.mm(x, head.weight.t(), out=narrow)
    else:
        torch.addmm(head.bias, x, head.weight.t(), out=narrow)
    return narrow, wide[0].copy_(narrow) if wide else narrow


def _cap(z: Tensor, softcap: float) -> Tensor:
    """Cap logits ``z`` in place and return the slope, ``[n, V]``, with which they change."""
    slope = torch.addcmul(z.new_ones(()), z.div_(softcap).tanh_(), z, value=-1)
    z.mul_(softcap)
    return slope


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
