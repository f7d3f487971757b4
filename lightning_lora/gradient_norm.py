"""The norm of gradients, some of which may be spread over ranks."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_lora.sharded import collective_device, is_sharded, local_part, shard_group


def total_norm(parameters: Sequence[nn.Parameter], norm_type: float = 2.0) -> Tensor:
    """Return the norm over all gradients, sharded and replicated, as one number that is the same on every rank.

    With sharded ones one all-reduce of one number, over the ranks that they are spread over. Called on all ranks.

    Args:
        parameters: those that have a gradient.
    """
    has_ranks = torch.distributed.is_available() and torch.distributed.is_initialized()
    sharded = [parameter for parameter in parameters if is_sharded(parameter)] if has_ranks else []
    spread = set(map(id, sharded))
    powers = [_power_sum([p.grad for p in parameters if id(p) not in spread], norm_type)]
    if sharded:
        group = shard_group(sharded)
        power = _power_sum([local_part(p.grad) for p in sharded], norm_type).to(collective_device(sharded[0], group))
        kind = torch.distributed.ReduceOp.MAX if math.isinf(norm_type) else torch.distributed.ReduceOp.SUM
        torch.distributed.all_reduce(power, kind, group=group)
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
    if len({(tensor.dtype, tensor.device) for tensor in filled}) == 1:
        norms = torch.stack(torch._foreach_norm(filled, norm_type, dtype=_wide(filled[0]))).float()
    else:
        device = filled[0].device
        each = [torch.linalg.vector_norm(t, norm_type, dtype=_wide(t)).float().to(device) for t in filled]
        norms = torch.stack(each)
    return norms.max() if math.isinf(norm_type) else (norms**norm_type).sum()


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
