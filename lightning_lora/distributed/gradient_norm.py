"""Compute the norm of gradients of which some are sharded."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.compat.torch import foreach_norm
from lightning_lora.ops.sharded import collective_device, is_sharded, local_part, shard_group


def total_norm(parameters: Iterable[nn.Parameter], norm_type: float = 2.0) -> Tensor:
    """Return the norm over the gradients of all parameters, sharded and replicated, as :func:`norm_over_ranks` does.

    Parameters without a gradient are passed over. Call on all ranks, after a backward that the strategy ran.
    """
    parameters = [parameter for parameter in parameters if parameter.grad is not None]
    sharded = [parameter for parameter in parameters if is_sharded(parameter)]
    spread = set(map(id, sharded))
    whole = [parameter.grad for parameter in parameters if id(parameter) not in spread]
    return norm_over_ranks(whole, [local_part(p.grad) for p in sharded], sharded, norm_type)


def norm_over_ranks(
    whole: Sequence[Tensor | None], parts: Sequence[Tensor], sharded: Sequence[Any], norm_type: float = 2.0
) -> Tensor:
    """Return the norm over gradients in float32, one number that is the same on every rank.

    With sharded ones one all-reduce of one number, over the ranks that they are spread over. Called on all ranks.

    Args:
        whole: what every rank holds.
        parts: this rank's of what is spread, and no other's.
        sharded: parameters that are spread as the parts are; none if there are no parts.
    """
    powers = [_power_sum(whole, norm_type)]
    if sharded:
        group = shard_group(sharded)
        power = _power_sum(parts, norm_type).to(collective_device(sharded[0], group))
        operation = torch.distributed.ReduceOp.MAX if math.isinf(norm_type) else torch.distributed.ReduceOp.SUM
        torch.distributed.all_reduce(power, operation, group=group)
        powers.append(power)
    powers = [power.to(powers[-1].device) for power in powers]
    if math.isinf(norm_type):
        return torch.stack(powers).max()
    return torch.stack(powers).sum() ** (1.0 / norm_type)


def _power_sum(tensors: Sequence[Tensor | None], norm_type: float) -> Tensor:
    """Return ``sum |g|^p`` in float32, or the maximum for an infinite ``p``."""
    filled = [tensor for tensor in tensors if tensor is not None and tensor.numel() > 0]
    if not filled:
        return torch.zeros(())
    by_kind: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in filled:
        by_kind.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    device = filled[0].device
    norms = torch.cat(
        [torch.stack(foreach_norm(alike, norm_type, _wide(alike[0]))).float().to(device) for alike in by_kind.values()]
    )
    return norms.max() if math.isinf(norm_type) else (norms**norm_type).sum()


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.complex64 if tensor.is_complex() else torch.float32)
