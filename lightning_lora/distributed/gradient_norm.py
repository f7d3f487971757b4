"""Norm and clipping of gradients of which some are sharded."""

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.compat.torch import foreach_norm
from lightning_lora.ops.sharded import collective_device, is_sharded, local_part, shard_group


def total_norm(parameters: Iterable[nn.Parameter], norm_type: float = 2.0) -> Tensor:
    """Return the norm over all gradients in float32 or wider, one number that is the same on every rank.

    With sharded ones one all-reduce of one number, over the ranks that they are spread over. Parameters without a
    gradient are passed over. Call on all ranks, after a backward that the strategy ran.
    """
    return norms_of([list(parameters)], norm_type)[0]


def norms_of(groups: Sequence[Sequence[nn.Parameter]], norm_type: float = 2.0) -> Tensor:
    """Return :func:`total_norm` of each group, in the one all-reduce."""
    held = [[parameter for parameter in group if parameter.grad is not None] for group in groups]
    sharded = [[parameter for parameter in group if is_sharded(parameter)] for group in held]
    whole: list[list[Any]] = [[parameter.grad for parameter in group if not is_sharded(parameter)] for group in held]
    dtype = functools.reduce(torch.promote_types, (p.dtype for group in held for p in group), torch.float32).to_real()
    device = next((gradient.device for own in whole for gradient in own), torch.device("cpu"))
    powers = [torch.stack([_power_sum(own, norm_type, dtype).to(device) for own in whole])]
    spread = [parameter for group in sharded for parameter in group]
    if spread:
        group = shard_group(spread)
        power = torch.stack([_power_sum([local_part(p.grad) for p in own], norm_type, dtype) for own in sharded])
        power = power.to(collective_device(spread[0], group))
        operation = torch.distributed.ReduceOp.MAX if math.isinf(norm_type) else torch.distributed.ReduceOp.SUM
        torch.distributed.all_reduce(power, operation, group=group)
        powers.append(power)
    total = torch.stack([power.to(powers[-1].device) for power in powers])
    return total.amax(0) if math.isinf(norm_type) else total.sum(0) ** (1.0 / norm_type)


def clip_apart(
    parameters: Iterable[nn.Parameter],
    owners: Mapping[int, str],
    max_norm: float | Mapping[str, float],
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
) -> Tensor:
    """Clip each named adapter's gradients by their own norm, and those of all other parameters by theirs.

    Args:
        owners: the adapter of each parameter, by identity.
        max_norm: with a mapping only its adapters are clipped.

    Returns:
        The norm over all of them before, as :func:`clip_by_norm` does.
    """
    groups: dict[str | None, list[nn.Parameter]] = {}
    for parameter in parameters:
        groups.setdefault(owners.get(id(parameter)), []).append(parameter)
    if isinstance(max_norm, Mapping):
        groups = {name: own for name, own in groups.items() if name in max_norm}
    totals = norms_of(list(groups.values()), float(norm_type))
    for (name, own), total in zip(groups.items(), totals, strict=True):
        limit = max_norm[name] if isinstance(max_norm, Mapping) else max_norm  # type: ignore[index]  # None is not there
        _scale_to(own, limit, total, error_if_nonfinite)
    norm: Tensor = torch.linalg.vector_norm(totals, norm_type)
    return norm


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
    _scale_to(held, max_norm, total, error_if_nonfinite)
    return total


def _scale_to(parameters: Sequence[nn.Parameter], max_norm: float, total: Tensor, error_if_nonfinite: bool) -> None:
    if error_if_nonfinite and not torch.isfinite(total):
        raise RuntimeError(f"the norm of the gradients is {total.item()} and cannot be clipped to {max_norm}")
    factor = (max_norm / (total + 1e-6)).clamp(max=1.0)
    for parameter in parameters:
        if parameter.grad is not None:
            part = local_part(parameter.grad)
            part.mul_(factor.to(part))


def clip_by_value(parameters: Iterable[nn.Parameter], clip_value: float) -> None:
    """Clamp every entry of every gradient to ``[-clip_value, clip_value]``."""
    for parameter in parameters:
        if parameter.grad is not None:
            local_part(parameter.grad).clamp_(-clip_value, clip_value)


def _power_sum(tensors: Sequence[Any], norm_type: float, dtype: torch.dtype) -> Tensor:
    """Return ``sum |g|^p`` in a dtype, or the maximum for an infinite ``p``."""
    filled = [tensor for tensor in tensors if tensor.numel() > 0]
    if not filled:
        return torch.zeros((), dtype=dtype)
    by_kind: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in filled:
        by_kind.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    device = filled[0].device
    norms = torch.cat(
        [torch.stack(foreach_norm(alike, norm_type, _wide(alike[0]))).to(device, dtype) for alike in by_kind.values()]
    )
    return norms.max() if math.isinf(norm_type) else (norms**norm_type).sum()


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.complex64 if tensor.is_complex() else torch.float32)
