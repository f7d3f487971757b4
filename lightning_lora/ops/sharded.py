"""Read and write tensors of which each rank holds a part.

FSDP2's are DTensors. What tensor parallelism splits are ordinary tensors, one part each, with a tag that says of what
(:func:`split_over`): the layers multiply by them, and optimizers and scalers see nothing unusual.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_lora.compat.distributed import is_striped, local_box, striped_shard
from lightning_lora.ops.guarded import bare

if torch.distributed.is_available():
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor
else:
    DTensor = None  # type: ignore[assignment, misc]  # a torch without distributed has none


def split_over(part: Any, mesh: Any, dim: int, stripes: int = 1) -> None:
    """Note on a tensor that it is this rank's part, along ``dim``, of one that is split evenly over ``mesh``.

    Args:
        stripes: of how many equal pieces along ``dim`` each rank has its share, one behind the other.
    """
    part.lora_split = (mesh, dim, stripes)


def is_sharded(tensor: Any) -> bool:
    """Whether a tensor is spread over ranks."""
    return is_dtensor(tensor) or (DTensor is not None and hasattr(tensor, "lora_split"))


def is_part(tensor: Any) -> bool:
    """Whether a tensor is a DTensor, or a tagged part over more than one rank."""
    return is_dtensor(tensor) or (is_sharded(tensor) and tensor.lora_split[0].size() > 1)


def is_spread(tensor: Any) -> bool:
    """Whether more than one rank is needed for all of a tensor. A mesh of one rank spreads nothing."""
    if not is_sharded(tensor):
        return False
    described = logical(tensor)
    sizes = zip(described.placements, described.device_mesh.shape, strict=True)
    return any(size > 1 and not placement.is_replicate() for placement, size in sizes)


def is_dtensor(tensor: Any) -> bool:
    """Whether a tensor is a DTensor. A torch without ``torch.distributed`` has none."""
    return DTensor is not None and isinstance(tensor, DTensor)


def logical(tensor: Any) -> Any:
    """Return a tensor with the shape of the whole: of a tagged part a DTensor that shares its storage, without grad."""
    split = getattr(tensor, "lora_split", None)
    if split is None:
        return tensor
    mesh, dim, stripes = split
    placement = Shard(dim) if stripes == 1 else striped_shard(dim, stripes)
    return DTensor.from_local(bare(tensor).detach(), mesh, [placement], run_check=False)


def whole(tensor: Any) -> Tensor:
    """Return the whole tensor. A sharded one is all-gathered over its mesh: call on all ranks."""
    full: Tensor = logical(tensor).full_tensor() if is_sharded(tensor) else tensor
    return full


def gathered_like(part: Tensor, like: Any) -> Tensor:
    """Return the whole ``[n]`` of this rank's ``part``, which is split as the first dimension of ``like`` is.

    All-gathered over the mesh of ``like``: call on all ranks.
    """
    if not is_sharded(like):
        return part
    own = part.to(collective_device(like))
    if is_dtensor(like):
        placed = DTensor.from_local(
            own, like.device_mesh, like.placements, run_check=False, shape=like.shape[:1], stride=(1,)
        )
        return placed.full_tensor().to(part.device)
    mesh, _, stripes = like.lora_split
    pieces = [torch.empty_like(own) for _ in range(mesh.size())]
    torch.distributed.all_gather(pieces, own, group=mesh.get_group())
    return torch.cat([piece.view(stripes, -1) for piece in pieces], dim=1).view(-1).to(part.device)


def local_part(tensor: Any) -> Tensor:
    """Return what this rank holds of a tensor, sharing its storage and without a guard."""
    part: Tensor = tensor.to_local() if is_dtensor(tensor) else bare(tensor)
    return part


def spread_like(tensor: Tensor, like: Any) -> Tensor:
    """Return a whole tensor as ``like`` is: a sharded one gets this rank's part, without communication."""
    if not is_sharded(like) or is_sharded(tensor):
        return tensor
    described = logical(like)
    tensor = tensor.to(local_part(like).device)
    spread = distribute_tensor(tensor, described.device_mesh, described.placements, src_data_rank=None)
    return spread if described is like else spread.to_local()


def part_of(value: Tensor, like: Any) -> Tensor:
    """Return this rank's part of ``value``, a whole tensor or a DTensor, split as ``like`` is; others as they are."""
    if not is_sharded(like) or value.shape != logical(like).shape:
        return value
    spread = spread_like(value, like)
    return spread if is_dtensor(like) else local_part(spread)


@torch.no_grad()
def write(target: Tensor, value: Tensor) -> None:
    """Copy a whole tensor, or this rank's part of one, into ``target`` in place, without communication."""
    if is_sharded(target):
        part = local_part(spread_like(value, target)) if value.shape == logical(target).shape else value
        local_part(target.detach()).copy_(part)
    else:
        target.copy_(value)


@dataclass(frozen=True)
class Box:
    """A rectangular piece of a tensor: where it begins in the whole and in this rank's part."""

    shape: tuple[int, ...]
    offset: tuple[int, ...]
    local_offset: tuple[int, ...]


def boxes(tensor: Any) -> list[Box]:
    """Return the pieces of the whole tensor that this rank holds; several where it has a share of every stripe."""
    start = (0,) * tensor.ndim
    if not is_sharded(tensor):
        return [Box(tuple(tensor.shape), start, start)]
    described = logical(tensor)
    placement = described.placements[0]
    if not is_striped(placement):
        return [Box(*local_box(described), start)]
    dim, stripes = placement.dim, placement.split_factor
    stripe, rank = described.shape[dim] // stripes, described.device_mesh.get_local_rank()
    size = stripe // described.device_mesh.size()
    shape = tuple(size if d == dim else length for d, length in enumerate(described.shape))

    def moved(by: int) -> tuple[int, ...]:
        return tuple(by if d == dim else 0 for d in range(len(shape)))

    return [Box(shape, moved(i * stripe + rank * size), moved(i * size)) for i in range(stripes)]


def shard_group(tensors: Iterable[Any]) -> Any:
    """Return the process group that the first sharded tensor is split over; ``None`` if none is sharded."""
    for tensor in tensors:
        if is_sharded(tensor):
            described = logical(tensor)
            for dimension, placement in enumerate(described.placements):
                if not placement.is_replicate():
                    return described.device_mesh.get_group(dimension)
    return None


def collective_device(tensor: Any, group: Any = None) -> torch.device:
    """Return the device that a collective about ``tensor`` takes: its own, but a GPU for NCCL, which knows no other."""
    if torch.distributed.get_backend(group) == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return local_part(tensor).device


def on_rank_zero(tensor: Tensor, *, is_zero: bool) -> Tensor:
    """Return a sharded tensor whole and on CPU on rank 0, and as a shape without values elsewhere; others as they are.

    Called on all ranks.
    """
    if not is_sharded(tensor):
        return tensor
    full = whole(tensor).detach()
    return full.to("cpu") if is_zero else full.to("meta")
