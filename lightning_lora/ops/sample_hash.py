"""Hash a sample of a tensor's values, each rounded to bfloat16, which a change of precision leaves.

A hash is a sum over the sampled elements, so that each rank can hash its own part of a sharded tensor.
"""

from typing import Any

import torch
from torch import Tensor

from lightning_lora.compat.distributed import is_striped
from lightning_lora.ops.sharded import boxes, is_sharded, local_part, logical

MULTIPLIER = 0x1E3779B97F4A7C15
_NUM_SAMPLES = 64
_MASK = 2**62 - 1


def dtype_name(tensor: Tensor) -> str:
    """Return the name of a tensor's dtype, such as ``"bfloat16"``."""
    return str(tensor.dtype).removeprefix("torch.")


def sample_hash(tensor: Tensor, like: Tensor, *, last_row: bool = False) -> Tensor:
    """Return a scalar int64 on CPU: this rank's addend to the hash of the whole tensor, or of its last row.

    Args:
        tensor: the values, or this rank's part of them.
        like: the parameter itself, which says what part of the whole that is.
    """
    like = logical(like)
    size = like.numel() // like.shape[0] if last_row else like.numel()
    positions = _sampled_positions(size)
    here = positions + (like.numel() - size)
    values = local_part(tensor.detach())
    if is_sharded(like):
        mine, here = _inside(here, like)
        positions = positions[mine]
    return _hash(torch.take(values, here.to(values.device)), positions)


def runs_hash(runs: Tensor, first: int, stride: int, shape: torch.Size, *, is_transposed: bool = False) -> Tensor:
    """Return a scalar int64 on CPU: the addend of some runs of values to the hash of a tensor of ``shape``.

    Args:
        runs: ``[number of runs, length]``.
        first: where the first run begins in the flattened tensor.
        stride: how far it is from a run to the next one; at least their length.
        is_transposed: hash the transpose of the tensor.
    """
    positions = _sampled_positions(shape.numel())
    places = positions
    if is_transposed:
        rows, columns = shape
        places = positions % rows * columns + positions // rows
    run, place = (places - first) // stride, (places - first) % stride
    mine = (run >= 0) & (run < runs.shape[0]) & (place < runs.shape[1])
    return _hash(runs[run[mine].to(runs.device), place[mine].to(runs.device)], positions[mine])


def _sampled_positions(size: int) -> Tensor:
    """Return up to 64 positions in a tensor of ``size`` values."""
    count = min(size, _NUM_SAMPLES)
    step = size // count
    # one position in each stride, not at the same place in all of them
    return torch.arange(count) * step + torch.arange(count) * 0x9E3779B1 % step


def _hash(values: Tensor, positions: Tensor) -> Tensor:
    """Return the sum of the hashes of values and their positions."""
    if len(positions) == 0:
        return torch.zeros((), dtype=torch.int64)
    bits = values.to(torch.bfloat16).view(torch.int16).to(torch.int64) & 0xFFFF
    keys = (positions.to(values.device) + 1) * MULTIPLIER
    mixed = (keys ^ (bits * 0x2545F4914F6CDD1D)) & _MASK
    mixed = (mixed ^ (mixed >> 29)) * 0x3F58476D1CE4E5B9
    return ((mixed & _MASK) >> 20).sum().cpu()


def _inside(positions: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return which flat positions of the whole tensor lie in this rank's part, and where they are in it."""
    mine = torch.zeros_like(positions, dtype=torch.bool)
    place = torch.zeros_like(positions)
    local_shape = local_part(like).shape
    placement = like.placements[0]  # type: ignore[attr-defined]  # a DTensor
    if is_striped(placement):
        return _inside_stripes(positions, like, placement)
    for box in boxes(like):
        own = [i - start for i, start in zip(torch.unravel_index(positions, like.shape), box.offset, strict=True)]
        here = torch.stack([(i >= 0) & (i < size) for i, size in zip(own, box.shape, strict=True)]).all(0)
        flat = torch.zeros_like(positions)
        for i, start, size in zip(own, box.local_offset, local_shape, strict=True):
            flat = flat * size + i + start
        mine, place = mine | here, torch.where(here, flat, place)
    return mine, place[mine]


def _inside_stripes(positions: Tensor, like: Any, placement: Any) -> tuple[Tensor, Tensor]:
    """Return the same of a tensor of which this rank has a share of every stripe: of some, or of very many."""
    coordinates = list(torch.unravel_index(positions, like.shape))
    stripe = like.shape[placement.dim] // placement.split_factor
    share = stripe // like.device_mesh.size()
    along = coordinates[placement.dim]
    mine = along % stripe // share == like.device_mesh.get_local_rank()
    coordinates[placement.dim] = along // stripe * share + along % share
    flat = torch.zeros_like(positions)
    for coordinate, size in zip(coordinates, local_part(like).shape, strict=True):
        flat = flat * size + coordinate
    return mine, flat[mine]
