"""Gradients of what trains in shards, which FSDP2 reduces: synchronize them, and let ranks leave some unused."""

import functools
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from lightning_lora.compat.distributed import fsdp_groups, gathered_parameter
from lightning_lora.distributed.presence import Presence
from lightning_lora.model.own_parameters import owners
from lightning_lora.ops.sharded import collective_device, is_sharded, local_part


def sharded_trainables(module: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that train in shards."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad and is_sharded(parameter)]


def set_gradient_sync(module: nn.Module, enabled: bool) -> None:
    """Let FSDP2 reduce the gradients of what trains in shards, or leave them on each rank."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.set_requires_gradient_sync(enabled, recurse=False)


def count_unused_as_zero(root: nn.Module) -> None:
    """Let what trains in shards and is unused on some rank count as zero there.

    FSDP2 reduce-scatters the gradients that a rank has, one behind the other: where ranks have others, it adds up those
    of different parameters. :func:`drop_unused` takes back what no rank used. And what stays gathered between forwards
    is frozen and unfrozen with what it was gathered from. Called once, when the root is sharded.
    """
    for group in _groups(root):
        if any(record.sharded_param.requires_grad for record in group.fsdp_params):
            group.__dict__["lora_filled"] = set()
            group.__dict__["pre_forward"] = functools.partial(_gather_as_flagged, group)
            group.__dict__["post_backward"] = functools.partial(_fill_and_reduce, group)


def _groups(module: nn.Module) -> list[Any]:
    return [group for part in module.modules() if isinstance(part, FSDPModule) for group in fsdp_groups(part)]


def _gather_as_flagged(group: Any, *arguments: Any) -> Any:
    result = type(group).pre_forward(group, *arguments)
    for record in group.fsdp_params:
        gathered, trains = gathered_parameter(record), record.sharded_param.requires_grad
        if gathered is not None and gathered.requires_grad != trains:
            gathered.requires_grad_(trains)
    return result


def _fill_and_reduce(group: Any, *unused: Any) -> None:
    for record in group.fsdp_params if group.reduce_grads else ():
        gathered = gathered_parameter(record)
        if gathered is None or not gathered.requires_grad:
            continue
        sharded = record.sharded_param
        if gathered.grad is None and record.unsharded_accumulated_grad is None:
            gathered.grad = torch.zeros_like(gathered)
            if sharded.grad is None:
                group.lora_filled.add(id(sharded))
        else:
            group.lora_filled.discard(id(sharded))
    type(group).post_backward(group, *unused)


def drop_unused(module: nn.Module) -> None:
    """Make gradients in shards ``None`` again that no rank has. One small all-reduce; called on all ranks.

    Those of a named adapter are averaged over the ranks that had rows of it.
    """
    groups = [group for group in _groups(module) if hasattr(group, "lora_filled")]
    sharded = [(group, record.sharded_param) for group in groups for record in group.fsdp_params]
    if not sharded:
        return
    present = [id(parameter) not in group.lora_filled for group, parameter in sharded]
    presence = Presence([parameter for _, parameter in sharded], present, owners(module))
    flags = torch.tensor(presence.flags, dtype=torch.float32).to(collective_device(sharded[0][1]))
    torch.distributed.all_reduce(flags)
    gradients = [None if one.grad is None else local_part(one.grad) for _, one in sharded]
    presence.average_over_ranks_with_rows(gradients, flags, torch.distributed.get_world_size())
    if not all(present):  # a look at the device's answer waits for it
        for (_, parameter), is_used in zip(sharded, flags.tolist()[: len(sharded)], strict=True):
            if not is_used:
                parameter.grad = None
    for group in groups:
        group.lora_filled.clear()
