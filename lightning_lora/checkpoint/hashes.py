"""Hash tensors: a sample of their values, which a change of precision leaves, or all of their bits.

A hash is a sum over the elements: of a sharded tensor each rank hashes its own part, and the integers are summed in one
all-reduce, so that nothing is gathered.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_lora.ops.quantized import stored_as, wraps_tensors
from lightning_lora.ops.sharded import boxes, collective_device, is_sharded, local_part, logical, shard_group

_NUM_SAMPLES = 64
_MULTIPLIER = 0x1E3779B97F4A7C15
_MASK = 2**62 - 1
_CHUNK = 2**18


def sampled(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the fingerprint of tensors by name, as ``{"names", "hashes", "dtypes"}``; only plain floats have one.

    Called on all ranks where some are sharded.
    """
    held = {name: tensor for name, tensor in tensors.items() if has_floats(tensor, tensor)}
    hashes = hash_samples([(tensor, tensor, False) for tensor in held.values()])
    return {"names": list(held), "hashes": hashes, "dtypes": [dtype_name(tensor) for tensor in held.values()]}


def has_floats(values: Tensor, like: Tensor) -> bool:
    """Whether a tensor, ``values`` of the parameter ``like``, holds numbers of its own to hash."""
    return stored_as(values) is None and not values.is_meta and like.numel() > 0


def dtype_name(tensor: Tensor) -> str:
    """Return the name of a tensor's dtype, such as ``"bfloat16"``."""
    return str(tensor.dtype).removeprefix("torch.")


def hash_samples(parts: Sequence[tuple[Tensor, Tensor, bool]]) -> Tensor:
    """Return the hashes of up to 64 values of each tensor, ``[n]`` int64 on CPU. Called on all ranks if any is sharded.

    Args:
        parts: the values, the parameter that they are of, and whether to hash its last row alone.
    """
    sums = [sample_hash(values, like, last_row=last_row) for values, like, last_row in parts]
    return _summed(sums, [like for _, like, _ in parts])


def sample_hash(tensor: Tensor, like: Tensor, *, last_row: bool = False) -> Tensor:
    """Return a scalar int64 on CPU: this rank's addend to the hash of the whole tensor, or of its last row.

    Args:
        tensor: the values, or this rank's part of them.
        like: the parameter itself, which says what part of the whole that is.
    """
    like = logical(like)
    size = like.numel() // like.shape[0] if last_row else like.numel()
    count = min(size, _NUM_SAMPLES)
    step = size // count
    # one position in each stride, not at the same place in all of them
    positions = torch.arange(count) * step + torch.arange(count) * 0x9E3779B1 % step
    here = positions + (like.numel() - size)
    values = local_part(tensor.detach())
    if is_sharded(like):
        mine, here = _inside(here, like)
        positions = positions[mine]
    if len(positions) == 0:
        return torch.zeros((), dtype=torch.int64)
    bits = torch.take(values, here.to(values.device)).to(torch.bfloat16).view(torch.int16).to(torch.int64) & 0xFFFF
    keys = (positions.to(values.device) + 1) * _MULTIPLIER
    mixed = (keys ^ (bits * 0x2545F4914F6CDD1D)) & _MASK
    mixed = (mixed ^ (mixed >> 29)) * 0x3F58476D1CE4E5B9
    return ((mixed & _MASK) >> 20).sum().cpu()


def _inside(positions: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return which flat positions of the whole tensor lie in this rank's part, and where they are in it."""
    mine = torch.zeros_like(positions, dtype=torch.bool)
    place = torch.zeros_like(positions)
    local_shape = local_part(like).shape
    for box in boxes(like):
        own = [i - start for i, start in zip(torch.unravel_index(positions, like.shape), box.offset, strict=True)]
        here = torch.stack([(i >= 0) & (i < size) for i, size in zip(own, box.shape, strict=True)]).all(0)
        flat = torch.zeros_like(positions)
        for i, start, size in zip(own, box.local_offset, local_shape, strict=True):
            flat = flat * size + i + start
        mine, place = mine | here, torch.where(here, flat, place)
    return mine, place[mine]


def exact_hashes(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Return an integer per tensor that changes with any of its bits, by name.

    All bytes are read, and none is copied but of tensors that are not contiguous. Good for comparing a tensor with
    itself at another time, in one layout. Called on all ranks where some are sharded.
    """
    hashes = _summed([exact_hash(tensor) for tensor in tensors.values()], list(tensors.values()))
    return dict(zip(tensors, hashes.tolist(), strict=True))


def exact_hash(tensor: Tensor) -> Tensor:
    """Return a scalar int64 on CPU: this rank's words of eight bytes, each times a number of its place, summed.

    The upper halves are summed once more, shifted down: a changed sign is the highest bit of a word, which two products
    could lose together. Bytes that make no whole word are words of their own.
    """
    part = local_part(tensor.detach())
    if wraps_tensors(part):  # a quantised weight: its codes and its scales
        inner = [exact_hash(getattr(part, name)) for name in part.__tensor_flatten__()[0]]  # type: ignore[attr-defined]
        return exact_hash(torch.stack(inner))
    flat = part.contiguous().flatten()
    size = flat.element_size()
    num_whole = flat.numel() * size // 8 * 8 // size if flat.storage_offset() * size % 8 == 0 else 0
    factors = _factors(flat.device)
    words = flat[:num_whole].view(torch.int64) if num_whole else factors[:0]
    total = torch.full((), flat.numel(), dtype=torch.int64, device=flat.device)
    for chunk in (*words.split(_CHUNK), *flat[num_whole:].view(torch.uint8).split(_CHUNK)):
        for numbers in (chunk.long(), chunk.long() >> 32):
            own = factors[: len(numbers)]
            # on CPU in one pass over the memory; other devices have no dot product of integers
            total = total * _MULTIPLIER + (numbers.dot(own) if numbers.is_cpu else (numbers * own).sum())
    rank = torch.distributed.get_rank() if is_sharded(tensor) else 0
    # addends of other ranks: each is multiplied by numbers of its own
    return (total * factors[rank] + (total >> 32) * factors[-1 - rank]).cpu()


@functools.cache
def _factors(device: torch.device) -> Tensor:
    """Return odd random integers, the same in every process."""
    drawn = torch.randint(-(2**62), 2**62, (_CHUNK,), generator=torch.Generator().manual_seed(0))
    return (2 * drawn + 1).to(device)


def _summed(sums: Sequence[Tensor], likes: Sequence[Tensor]) -> Tensor:
    """Return the hashes as ``[n]`` int64 on CPU, those of sharded tensors summed over their ranks in one all-reduce."""
    if not sums:
        return torch.empty(0, dtype=torch.int64)
    hashes = torch.stack(list(sums))
    group = shard_group(likes)
    if group is None:
        return hashes
    spread = [index for index, like in enumerate(likes) if is_sharded(like)]
    part = hashes[spread].to(collective_device(likes[spread[0]], group))
    torch.distributed.all_reduce(part, group=group)
    hashes[spread] = part.cpu()
    return hashes
