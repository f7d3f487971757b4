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
from lightning_lora.ops.sample_hash import MULTIPLIER, dtype_name, sample_hash
from lightning_lora.ops.sharded import collective_device, is_sharded, local_part, shard_group

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


def hash_samples(parts: Sequence[tuple[Tensor, Tensor, bool]]) -> Tensor:
    """Return the hashes of up to 64 values of each tensor, ``[n]`` int64 on CPU. Called on all ranks if any is sharded.

    Args:
        parts: the values, the parameter that they are of, and whether to hash its last row alone.
    """
    sums = [sample_hash(values, like, last_row=last_row) for values, like, last_row in parts]
    return _summed(sums, [like for _, like, _ in parts])


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
            total = total * MULTIPLIER + (numbers.dot(own) if numbers.is_cpu else (numbers * own).sum())
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
