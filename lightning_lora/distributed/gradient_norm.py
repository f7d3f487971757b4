"""Norm and clipping of gradients of which some are sharded."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.compat.torch import foreach_norm
from lightning_lora.ops.sharded import collective_device, is_sharded, local_part, shard_group


def total_norm(parameters: Iterable[nn.Parameter], norm_type: float = 2.0) -> Tensor:
    """Return the norm over all gradients in float32, one number that is the same on every rank.

    With sharded ones one all-reduce of one number, over the ranks that they are spread over. Parameters without a
    gradient are passed over. Call on all ranks, after a backward that the strategy ran.
    """
    held = [parameter for parameter in parameters if parameter.grad is not None]
    sharded = [parameter for parameter in held if is_sharded(parameter)]
    powers = [_power_sum([parameter.grad for parameter in held if not is_sharded(parameter)], norm_type)]
    if sharded:
        group = shard_group(sharded)
        power = _power_sum([local_part(parameter.grad) for parameter in sharded], norm_type)
        power = power.to(collective_device(sharded[0], group))
        operation = torch.distributed.ReduceOp.MAX if math.isinf(norm_type) else torch.distributed.ReduceOp.SUM
        torch.distributed.all_reduce(power, operation, group=group)
        powers.append(power)
    powers = [power.to(powers[-1].device) for power in powers]
    if math.isinf(norm_type):
        return torch.stack(powers).max()
    return torch.stack(powers).sum() ** (1.0 / norm_type)


def clip_by_norm(
    parameters: Iterable[nn.Parameter], max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False
) -> Tensor:
    """Scale gradients so that their norm over all tensors, sharded and replicated, is at most ``max_norm``.

    One all-reduce of one number over the ranks that shards are spread over. Called on all ranks.

    Returns:
        The norm before, the same on every rank.

    Raises:
        RuntimeError: it is not finite and ``error_if_nonfinite``.
    """
    held = [parameter for parameter in parameters if parameter.grad is not None]
    total = total_norm(held, float(norm_type))
    if error_if_nonfinite and not torch.isfinite(total):
        raise RuntimeError(f"the norm of the gradients is {total.item()} and cannot be clipped to {max_norm}")
    factor = (max_norm / (total + 1e-6)).clamp(max=1.0)
    for parameter in held:
        part = local_part(parameter.grad)
        part.mul_(factor.to(part))
    return total


def clip_by_value(parameters: Iterable[nn.Parameter], clip_value: float) -> None:
    """Clamp every entry of every gradient to ``[-clip_value, clip_value]``."""
    for parameter in parameters:
        if parameter.grad is not None:
            local_part(parameter.grad).clamp_(-clip_value, clip_value)


def _power_sum(tensors: Sequence[Any], norm_type: float) -> Tensor:
    """Return ``sum |g|^p`` in float32, or the maximum for an infinite ``p``."""
    filled = [tensor for tensor in tensors if tensor.numel() > 0]
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
