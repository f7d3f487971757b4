"""Compute the cross-entropy of a frozen linear layer's output without whole logits.

The gradient of x is formed beside the loss, while a tile of logits is there (see ``tiles.py``): they are not made
again, and with a frozen W nothing else is needed. Kept is ``u = dloss/dx / sigmoid d`` (see ``parallel.py``), as
large as x.
"""

from typing import Any

import torch
from torch import Tensor

from lightning_lora.ops.autocast import autocast_dtype
from lightning_lora.ops.cross_entropy.parallel import agree, loss_and_weight, place, refuse_create_graph
from lightning_lora.ops.cross_entropy.tiles import Head, over_tiles

_PARTS = 26  # what is subtracted at once of the rows


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
        found = over_tiles(x, Head(weight, bias, softcap), column, here, u)
        mine = found.highest + found.total.log()
        others, own = (mine, found.own) if group is None else agree(mine, found.own, group)
        losses, share = loss_and_weight(others, own)
        if u is not None:
            of_this_rank = (mine - others.clamp_min(torch.finfo(mine.dtype).min)).exp()  # -inf - -inf would be nan
            _subtract_targets(u, weight, column, of_this_rank, found.slope)
    return losses, share, u


def _subtract_targets(u: Tensor, weight: Tensor, column: Tensor, of_this_rank: Tensor, at_target: Tensor) -> None:
    """Turn ``q W`` ``[T, h]``, of this rank's part, into ``of_this_rank * q W - at_target * W[target]`` in place."""
    rows = max(1, u.shape[0] // _PARTS)
    pieces = (tensor.split(rows) for tensor in (u, column, of_this_rank[:, None], at_target[:, None]))
    for part, which, share, slope in zip(*pieces, strict=True):
        part.copy_((part * share).addcmul_(weight[which], slope, value=-1))
