"""Fingerprint the frozen base, so that an adapter is loaded only onto the base that it was trained on."""

import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.model.families import name_or_path
from lightning_lora.model.names import clean_name
from lightning_lora.model.side_effects import FrozenStatistics
from lightning_lora.model.spread import reshard
from lightning_lora.model.state import injection_of, named_lora_layers, named_trained_whole, require_injection
from lightning_lora.ops.quantized import stored_as, wraps_tensors
from lightning_lora.ops.sharded import boxes, collective_device, is_sharded, local_part, logical, shard_group

NUM_SAMPLES = 64
_MULTIPLIER = 0x1E3779B97F4A7C15
_MASK = 2**62 - 1
_CHUNK = 2**18


def fingerprint(root: nn.Module) -> dict[str, Any]:
    """Return one integer per frozen tensor of the base, as ``{"source", "names", "hashes", "dtypes", "embeddings"}``.

    Each integer is a sum, over up to 64 positions that depend on the tensor's size alone, of a hash of the position and
    of the value there rounded to bfloat16. So it does not change with the precision that a base is loaded in, and sums
    of shards are the sum of the whole. It tells one set of trained weights from another; it is no proof against a
    forger. Tensors that are quantised or on the meta device are left out. For embeddings the number of rows and a hash
    of the last one are kept too: rows that a resize added hold values of their own.

    Of a sharded base each rank hashes its own part, and the integers are summed: call on all ranks then.
    """
    reshard(root)
    tables = {id(m._parameters.get("weight")) for m in root.modules() if isinstance(m, nn.Embedding)}
    parameters = {clean_name(name): parameter for name, parameter in root.named_parameters()}
    held = {
        name: (tensor, parameters.get(name, tensor))
        for name, tensor in named_base_tensors(root)
        if stored_as(tensor) is None and tensor.device.type != "meta" and parameters.get(name, tensor).numel() > 0
    }
    resizable = [name for name in held if id(parameters.get(name)) in tables]
    sums = [_hash(tensor, like) for tensor, like in held.values()]
    sums += [_hash(*held[name], last_row=True) for name in resizable]
    hashes = summed(sums, [held[name][1] for name in [*held, *resizable]])
    dtypes = {name: str(tensor.dtype).removeprefix("torch.") for name, (tensor, _) in held.items()}
    return {
        "source": name_or_path(root),
        "names": list(held),
        "hashes": hashes[: len(held)].clone(),
        "dtypes": list(dtypes.values()),
        "embeddings": {
            name: [logical(held[name][1]).shape[0], int(value), dtypes[name]]
            for name, value in zip(resizable, hashes[len(held) :].tolist(), strict=True)
        },
    }


def remember_fingerprint(root: nn.Module) -> None:
    """Keep the fingerprint of a base that was just spread, so that one rank can ask for it. Called on all ranks."""
    injection = require_injection(root)
    injection.fingerprint = fingerprint(root)


def known_fingerprint(root: nn.Module) -> dict[str, Any]:
    """Return a base's fingerprint without communication: of a spread base, the one kept when it was spread."""
    injection = injection_of(root)
    kept = None if injection is None else injection.fingerprint
    return fingerprint(root) if kept is None or not any(map(is_sharded, root.parameters())) else kept


def first_difference(root: nn.Module, recorded: dict[str, Any]) -> str | None:
    """Return what first tells ``root`` from the recorded base, in words, or ``None`` if nothing does.

    Tensors without a fingerprint on either side, and float16 against another dtype (which rounds twice), are not
    compared.
    """
    own = fingerprint(root)
    present = {name for name, _ in [*root.named_parameters(), *root.named_buffers()]} | set(own["names"])
    cleaned = {clean_name(name) for name in present}
    lacking = next((name for name in recorded["names"] if name not in cleaned), None)
    if lacking is not None:
        return f"its base has a tensor {lacking!r}, which this model lacks"
    # only where all else is the same was the base resized; another base has other embeddings too
    difference = first_other_value(own, recorded, skipped=_of_the_vocabulary(root, own["embeddings"]))
    if difference is None:
        difference = _resized(own["embeddings"], recorded.get("embeddings", {}))
    return first_other_value(own, recorded) if difference is None else difference


def renamed(recorded: Mapping[str, Any], rename: Callable[[str], str | None]) -> dict[str, Any]:
    """Return a fingerprint under other names; tensors that have none, and what is known of embeddings, are left out."""
    names = [rename(name) for name in recorded["names"]]
    return {**_at(recorded, [i for i, name in enumerate(names) if name is not None], names), "embeddings": {}}


def without(recorded: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """Return a fingerprint without the tensors of these names."""
    kept = [index for index, name in enumerate(recorded["names"]) if name not in names]
    embeddings = {name: value for name, value in recorded["embeddings"].items() if name not in names}
    return {**_at(recorded, kept, recorded["names"]), "embeddings": embeddings}


def _at(recorded: Mapping[str, Any], kept: list[int], names: Sequence[str | None]) -> dict[str, Any]:
    return {
        "source": recorded["source"],
        "names": [names[index] for index in kept],
        "hashes": recorded["hashes"][kept],
        "dtypes": [recorded["dtypes"][index] for index in kept],
    }


def first_other_value(
    own: dict[str, Any], recorded: dict[str, Any], skipped: Collection[str] = frozenset()
) -> str | None:
    """Return which tensor of two fingerprints is the first of other values, in words; those of one alone are passed."""
    name = first_other_name(own, recorded, skipped)
    return None if name is None else f"the base tensor {name!r} holds other values"


def first_other_name(
    own: dict[str, Any], recorded: dict[str, Any], skipped: Collection[str] = frozenset()
) -> str | None:
    """Return the name of the first tensor whose values differ in two fingerprints."""
    own_hashes = dict(zip(own["names"], zip(own["hashes"].tolist(), own["dtypes"], strict=True), strict=True))
    rows = zip(recorded["names"], recorded["hashes"].tolist(), recorded["dtypes"], strict=True)
    for name, value, dtype in rows:
        if name not in own_hashes or name in skipped:
            continue
        own_value, own_dtype = own_hashes[name]
        if own_value != value and (dtype == own_dtype or "float16" not in (dtype, own_dtype)):
            return str(name)
    return None


def _of_the_vocabulary(root: nn.Module, embeddings: dict[str, list[Any]]) -> set[str]:
    """Return the tensors that resizing an embedding changes: those with a row for each of its rows, as a head has."""
    rows = {number for number, *_ in embeddings.values()}
    named = [*root.named_parameters(), *root.named_buffers()]
    return {clean_name(name) for name, tensor in named if tensor.ndim > 0 and logical(tensor).shape[0] in rows}


def _resized(own: dict[str, list[Any]], recorded: dict[str, list[Any]]) -> str | None:
    """Return what tells embeddings apart that were resized, in words, or ``None``."""
    for name in recorded.keys() & own.keys():
        (rows, last, dtype), (own_rows, own_last, own_dtype) = recorded[name], own[name]
        if rows != own_rows:
            return (
                f"its {name!r} has {rows} rows, this model's {own_rows}: call "
                f"model.resize_token_embeddings({rows}) before the model is adapted"
            )
        if last != own_last and (dtype == own_dtype or "float16" not in (dtype, own_dtype)):
            return (
                f"{name!r} holds other values in its last row. Rows that resize_token_embeddings adds are random: seed "
                "before it, or train them (trainable_token_indices, modules_to_save), so that they are in the file"
            )
    return None


def exact_hashes(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Return an integer per tensor that changes with any of its bits, by name.

    All bytes are read, and none is copied but of tensors that are not contiguous. Good for comparing a tensor with
    itself at another time, in one layout: a sharded one is hashed part by part and the integers are summed over its
    ranks (call on all ranks then).
    """
    hashes = summed([exact_hash(tensor) for tensor in tensors.values()], list(tensors.values()))
    return dict(zip(tensors, hashes.tolist(), strict=True))


def sampled(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the fingerprint of tensors by name, as ``{"names", "hashes", "dtypes"}``; only plain floats have one.

    Of sharded ones each rank hashes its own part, and the integers are summed: call on all ranks then.
    """
    held = {n: t for n, t in tensors.items() if stored_as(t) is None and not t.is_meta and t.numel() > 0}
    dtypes = [str(tensor.dtype).removeprefix("torch.") for tensor in held.values()]
    return {
        "names": list(held),
        "hashes": summed(local_hashes(held.values()), list(held.values())),
        "dtypes": dtypes,
    }


def local_hashes(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return the hash of each tensor, of a sharded one this rank's addend: scalar int64 on CPU."""
    return [_hash(tensor.detach(), tensor) for tensor in tensors]


def named_base_tensors(root: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the frozen tensors of the base by clean name, as they are without any merged adapter.

    These are its parameters, and the running statistics of its batch normalisations.
    """
    layers = named_lora_layers(root)
    adapters = {id(p) for layer in layers.values() for _, p in layer.named_adapter_tensors()}
    originals = {
        id(layer._parameters[name]): original
        for layer in layers.values()
        for name, original in (layer.lora_original or {}).items()
    }
    whole = named_trained_whole(root)
    for name, parameter in root.named_parameters():
        clean = clean_name(name)
        if id(parameter) in adapters or clean in whole or parameter.requires_grad:
            continue
        original = originals.get(id(parameter))
        yield clean, parameter.detach() if original is None else original
    for name, module in root.named_modules():
        if isinstance(module, FrozenStatistics):
            yield from module.named_buffers(clean_name(name), recurse=False)


def _hash(tensor: Tensor, like: Tensor, *, last_row: bool = False) -> Tensor:
    """Return a scalar int64 on CPU: this rank's addend to the hash of the whole tensor, or of its last row.

    Args:
        tensor: the values, or this rank's part of them.
        like: the parameter itself, which says what part of the whole that is.
    """
    like = logical(like)
    row = like.numel() // like.shape[0] if last_row else like.numel()
    count = min(row, NUM_SAMPLES)
    step = row // count
    within = torch.arange(count) * 0x9E3779B1 % step  # not the same place in every stride
    positions = torch.arange(count) * step + within
    here = positions + (like.numel() - row)
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


def summed(sums: Sequence[Tensor], likes: Sequence[Tensor]) -> Tensor:
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
