"""Cross-entropy of what a frozen linear layer gives, a chunk of rows at a time.

    x_chunk [n, h] --- W^T, b ---> z [n, V] --- float32, a few rows at a time ---> q [n, V] --- W ---> q W [n, h]
                                     the same buffer, for every chunk

The gradient of x is formed beside the loss, while the logits are there; they are not made again, and with a frozen W
nothing else is needed of them. Kept is ``u = dloss/dx / sigmoid d`` (see ``parallel_loss.py``), as large as x.
"""

import math
from typing import Any

import torch
from torch import Tensor

from lightning_lora.functional import autocast_dtype
from lightning_lora.parallel_loss import agree, loss_and_weight, place, refuse_create_graph, set_apart

# of the rows, so that all buffers together stay below a twentieth of the logits; of fewer rows, what products are fast
# with, and memory does not matter yet
_PARTS, _MIN_ROWS, _MIN_NUMEL = 26, 64, 6 * 2**20
_CACHE_BYTES = 2 * 2**20  # of a CPU core
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
        mine, own, slope = _over_chunks(x, weight, bias, column, here, softcap, u)
        others, own = (mine, own) if group is None else agree(mine, own, group)
        losses, share = loss_and_weight(others, own)
        if u is not None:
            of_this_rank = (mine - others.clamp_min(torch.finfo(mine.dtype).min)).exp()  # -inf - -inf would be nan
            _subtract_targets(u, weight, column, of_this_rank, slope * here)
    return losses, share, u


def _over_chunks(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    column: Tensor,
    here: Tensor,
    softcap: float | None,
    product: Tensor | None,
) -> Tensor:
    """Return what :func:`_apart` does of all rows, ``[3, T]``, and write ``q W`` to ``product`` ``[T, h]``, if any."""
    wide = torch.promote_types(x.dtype, torch.float32)
    chunk, block = _sizes(x, weight.shape[0], softcap)
    logits = x.new_empty(min(chunk, x.shape[0]), weight.shape[0])
    scratch = None if wide == x.dtype else logits.new_empty(block, weight.shape[0], dtype=wide)
    factor = _NARROWEST.get(x.dtype, 1.0)
    found = x.new_empty(3, x.shape[0], dtype=wide)
    for start in range(0, x.shape[0], chunk):
        rows = x[start : start + chunk]
        z = logits[: rows.shape[0]]
        torch.mm(rows, weight.t(), out=z) if bias is None else torch.addmm(bias, rows, weight.t(), out=z)
        for first in range(0, z.shape[0], block):
            narrow = z[first : first + block]
            part = narrow if scratch is None else scratch[: narrow.shape[0]].copy_(narrow)
            some = slice(start + first, start + first + narrow.shape[0])
            for into, values in zip(found, _apart(part, column[some], here[some], softcap, factor), strict=True):
                into[some] = values
            if product is not None and scratch is not None:
                narrow.copy_(part)
        if product is not None:
            product[start : start + chunk].addmm_(z, weight, beta=0, alpha=1 / factor)
    return found


def _apart(
    z: Tensor, column: Tensor, here: Tensor, softcap: float | None, factor: float
) -> tuple[Tensor, Tensor, Tensor | float]:
    """Return :func:`set_apart` of capped logits, and the cap's slope at the target; ``z`` is left times the slope."""
    if not softcap:
        return *set_apart(z, column, here, factor), 1.0
    slope = torch.addcmul(z.new_ones(()), z.div_(softcap).tanh_(), z, value=-1)
    at_target = slope.gather(1, column[:, None])[:, 0]
    others, own = set_apart(z.mul_(softcap), column, here, factor)
    z.mul_(slope)
    return others, own, at_target


def _subtract_targets(u: Tensor, weight: Tensor, column: Tensor, of_this_rank: Tensor, at_target: Tensor) -> None:
    """Turn ``q W`` ``[T, h]``, of this rank's part, into ``of_this_rank * q W - at_target * W[target]`` in place."""
    rows = max(1, u.shape[0] // _PARTS)
    pieces = (tensor.split(rows) for tensor in (u, column, of_this_rank[:, None], at_target[:, None]))
    for part, which, share, slope in zip(*pieces, strict=True):
        part.copy_((part * share).addcmul_(weight[which], slope, value=-1))


def _sizes(x: Tensor, size: int, softcap: float | None) -> tuple[int, int]:
    """Return how many rows make a chunk of logits, and how many of those are in float32 at once."""
    num_rows, width = x.shape[0], x.element_size()
    most = max(num_rows // _PARTS, _MIN_ROWS, _MIN_NUMEL // size) // 8 * 8  # tensor cores take rows by eight
    chunk = 8 * math.ceil(num_rows / max(math.ceil(num_rows / most), 1) / 8) or 8  # of about equal sizes
    if x.device.type == "cpu":
        block = min(_CACHE_BYTES // (size * max(width, 4)), chunk // 16)
    elif width < 4 or softcap:
        block = chunk // (16 if softcap else 8)
    else:
        block = chunk  # in place, and few kernels
    return chunk, max(block, 1)
