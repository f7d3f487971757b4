"""Compute the loss of logits ``[T, vocabulary / ranks]`` that are split over ranks.

The target's logit is kept apart from the others, so that nothing cancels: with
``d = log sum_{v != t} exp z_v - z_t``, which takes two numbers per token and rank,

    loss = log(1 + exp d),   dloss / dz_t = -sigmoid d,   dloss / dz_v = sigmoid d * q_v,

where q is the softmax of the others alone.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def place(targets: Tensor, size: int, group: Any) -> tuple[Tensor, Tensor]:
    """Return the columns of targets ``[T]`` among the ``size`` of this rank, and whether they are here."""
    column = targets - (0 if group is None else torch.distributed.get_rank(group) * size)
    here = (column >= 0) & (column < size)
    return column.clamp(0, size - 1), here


def set_apart(z: Tensor, column: Tensor, here: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Turn logits ``z`` ``[n, V]`` in place into ``exp(z - highest)`` of all but the target, which becomes 0.

    Args:
        column: ``[n]``, the target's.
        here: ``[n]``, whether it is in ``z`` at all.

    Returns:
        The highest of the others, or the least number if all are -inf; the sum of what ``z`` has become; and the
        target's logit, 0 where it is not here: ``[n]`` each.
    """
    own = z.gather(1, column[:, None])
    z.scatter_(1, column[:, None], own.masked_fill(here[:, None], -torch.inf))
    highest = z.amax(1, keepdim=True).clamp_min_(torch.finfo(z.dtype).min)  # -inf - -inf would be nan
    total = z.sub_(highest).exp_().sum(1)
    return highest[:, 0], total, own[:, 0].masked_fill(~here, 0.0)


def agree(others: Tensor, own: Tensor, group: Any) -> tuple[Tensor, Tensor]:
    """Return the same two of all ranks' parts, ``[T]`` each: one all-gather of ``2 T`` numbers, on all of them.

    Every rank computes the same of the same numbers, so that all have the same losses to the last bit.
    """
    mine = torch.stack([others, own])
    parts = mine.new_empty(torch.distributed.get_world_size(group), *mine.shape)
    torch.distributed.all_gather_into_tensor(parts.flatten(0, 1), mine, group=group)
    return parts[:, 0].logsumexp(0), parts[:, 1].sum(0)


def loss_and_weight(others: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``log(1 + exp d)`` and ``sigmoid d``, ``[T]`` each: the losses, and how much is not the target's."""
    d = others - own
    return -F.logsigmoid(-d), d.sigmoid()


def refuse_create_graph() -> None:
    """Raise ``RuntimeError`` in a backward whose result would be a constant to a second one."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "this loss can be differentiated once, and backward was called with create_graph=True: use "
            "F.cross_entropy on the model's logits for second derivatives"
        )


def losses_of_parts(logits: Tensor, targets: Tensor, group: Any) -> Tensor:
    """Return ``log sum exp(z) - z[target]``, ``[T]``, of logits that are split over ``group``. Called on all ranks."""
    losses: Tensor = _VocabParallelCrossEntropy.apply(logits, targets, group)  # type: ignore[no-untyped-call]
    return losses


class _VocabParallelCrossEntropy(torch.autograd.Function):
    """Every rank gets the same losses, and the gradient of its own part.

    The softmax is made again in backward, from the logits in their own dtype, instead of being kept in float32.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, group: Any) -> Tensor:
        column, here = place(targets, logits.shape[1], group)
        wide = torch.promote_types(logits.dtype, torch.float32)
        highest, total, own = set_apart(logits.to(wide, copy=True), column, here)
        others, own = agree(highest + total.log(), own, group)
        losses, weight = loss_and_weight(others, own)
        ctx.save_for_backward(logits, others, weight, column, here)
        return losses

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        refuse_create_graph()
        logits, others, weight, column, here = ctx.saved_tensors
        slope = (logits.to(others.dtype) - others[:, None]).exp_()  # [T, vocabulary / ranks]
        at_target = slope.gather(1, column[:, None])
        slope.scatter_(1, column[:, None], torch.where(here[:, None], -1.0, at_target))
        return slope.mul_((weight * grad)[:, None]).to(logits.dtype), None, None
