"""Move what every rank holds whole to its device, and check that it is equal on all ranks."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from lightning_lora.checkpoint.hashes import exact_hash
from lightning_lora.model.names import clean_name, is_inside_any, joined
from lightning_lora.model.spread import class_name
from lightning_lora.model.state import injected_roots, require_injection
from lightning_lora.ops.sample_hash import sample_hash
from lightning_lora.ops.sharded import collective_device, is_sharded, local_part

_BROADCAST_NUMEL = 2**26
_ROUNDING = 1e-5  # of a tensor's largest value


def move_to(module: nn.Module, device: torch.device) -> None:
    """Move what is whole to ``device``, and keep every parameter the object that it is."""
    for part in module.modules():
        for parameter in part._parameters.values():
            if parameter is not None and not is_sharded(parameter) and parameter.device != device:
                parameter.data = parameter.data.to(device)
        for name, buffer in part._buffers.items():
            if buffer is not None and not is_sharded(buffer):
                part._buffers[name] = buffer.to(device)


def refuse_other_sizes(module: nn.Module, device: torch.device) -> None:
    """Raise ``ValueError`` where ranks built models of other sizes, whose collectives would wait for each other."""
    tensors = [*module.parameters(), *module.buffers()]
    if any(differ(torch.tensor([len(tensors), sum(tensor.numel() for tensor in tensors)], device=device))):
        raise ValueError(
            f"the ranks built different models: on this one {class_name(module)} has {len(tensors)} tensors, on "
            "another more, fewer, or of other sizes"
        )


@torch.no_grad()
def make_equal(root: nn.Module, device: torch.device, group: ProcessGroup | None = None) -> None:
    """Give every rank of ``group``, or of all, its first's base where they differ, as random weights without a seed do.

    Of tensors that are spread over ranks, the ranks of the group must hold the same part.
    """
    tensors = [p for p in root.parameters() if p.device.type != "meta" and p.is_floating_point()]
    others = differ(torch.stack([sample_hash(one, one) for one in tensors]).to(device), group) if tensors else []
    broadcast_together([tensor for tensor, is_other in zip(tensors, others, strict=True) if is_other], device, group)


def differ(numbers: Tensor, group: ProcessGroup | None = None) -> list[bool]:
    """Return which numbers are not the same on all ranks of ``group``, or on all ranks. Called on all of them."""
    highest, lowest = numbers.clone(), numbers.clone()
    torch.distributed.all_reduce(highest, torch.distributed.ReduceOp.MAX, group=group)
    torch.distributed.all_reduce(lowest, torch.distributed.ReduceOp.MIN, group=group)
    return (highest != lowest).tolist()


@torch.no_grad()
def drifted(tensors: Sequence[nn.Parameter], group: ProcessGroup | None = None) -> list[tuple[nn.Parameter, float]]:
    """Return the tensors that differ between the ranks of ``group``, or all, by more than rounding; and by how much.

    Called on all of them; exchanges one number per tensor, and the values of those that differ at all. Ranks on
    devices of different kinds may round the same step differently, which is no fault of the run.
    """
    if not tensors:
        return []
    device = collective_device(tensors[0], group)
    drift = []
    others = differ(torch.stack([exact_hash(local_part(tensor.detach())).to(device) for tensor in tensors]), group)
    for tensor, is_other in zip(tensors, others, strict=True):
        if not is_other:
            continue
        dtype = torch.promote_types(tensor.dtype, torch.float32)
        highest = local_part(tensor.detach()).to(device, dtype, copy=True)
        lowest = highest.clone()
        torch.distributed.all_reduce(highest, torch.distributed.ReduceOp.MAX, group=group)
        torch.distributed.all_reduce(lowest, torch.distributed.ReduceOp.MIN, group=group)
        by, size = float((highest - lowest).max()), float(torch.maximum(highest.abs(), lowest.abs()).max())
        if by > max(_ROUNDING, 4 * torch.finfo(tensor.dtype).eps) * size:
            drift.append((tensor, by))
    return drift


def broadcast_replicated(module: nn.Module, device: torch.device) -> None:
    """Give every rank rank 0's values of all parameters that are whole, and of all buffers. Called on all ranks."""
    tensors = [*module.parameters(), *module.buffers()]
    broadcast_together([tensor for tensor in tensors if not is_sharded(tensor)], device)


def changing_buffers(module: nn.Module) -> list[Tensor]:
    """Return the buffers that a step may change: outside the adapted models, and where those train whole."""
    roots = injected_roots(module)
    whole = [joined(path, name) for path, root in roots.items() for name in require_injection(root).trained_whole]
    return [
        buffer
        for name, buffer in module.named_buffers()
        if is_inside_any(clean_name(name), whole) or not is_inside_any(clean_name(name), roots)
    ]


@torch.no_grad()
def broadcast_together(tensors: Sequence[Tensor], device: torch.device, group: ProcessGroup | None = None) -> None:
    """Give every rank of ``group``, or of all, its first's values, in one broadcast per dtype, or more for large ones.

    Called on all of them.
    """
    first = 0 if group is None else torch.distributed.get_global_rank(group, 0)
    batches: dict[tuple[torch.dtype, int], list[Tensor]] = {}
    sizes: dict[torch.dtype, int] = {}
    for tensor in tensors:
        if tensor.device.type != "meta" and tensor.numel() > 0:
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.numel()
            batches.setdefault((tensor.dtype, sizes[tensor.dtype] // _BROADCAST_NUMEL), []).append(tensor.detach())
    for alike in batches.values():
        flat = torch.cat([tensor.reshape(-1).to(device) for tensor in alike])
        torch.distributed.broadcast(flat, first, group=group)
        for tensor, values in zip(alike, flat.split([tensor.numel() for tensor in alike]), strict=True):
            tensor.copy_(values.view_as(tensor))
