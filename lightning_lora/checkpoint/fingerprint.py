"""Fingerprint the frozen base, so that an adapter is loaded only onto the base that it was trained on."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from lightning_lora.checkpoint.hashes import dtype_name, has_floats, hash_samples
from lightning_lora.model.families import name_or_path
from lightning_lora.model.names import clean_name
from lightning_lora.model.side_effects import FrozenStatistics
from lightning_lora.model.spread import reshard
from lightning_lora.model.state import injection_of, named_lora_layers, named_trained_whole, require_injection
from lightning_lora.ops.sharded import is_sharded, logical


def fingerprint(root: nn.Module) -> dict[str, Any]:
    """Return one integer per frozen tensor of the base, as ``{"source", "names", "hashes", "dtypes", "embeddings"}``.

    Each integer is a sum, over up to 64 positions that depend on the tensor's size alone, of a hash of the position and
    of the value there rounded to bfloat16. So it does not change with the precision that a base is loaded in. It tells
    one set of trained weights from another; it is no proof against a forger. Tensors that are quantised or on the meta
    device are left out. For embeddings the number of rows and a hash of the last one are kept too: rows that a resize
    added hold values of their own. Called on all ranks where the base is sharded.
    """
    reshard(root)
    base = {name: (values, like) for name, values, like in _named_base_tensors(root) if has_floats(values, like)}
    tables = {id(m._parameters.get("weight")) for m in root.modules() if isinstance(m, nn.Embedding)}
    resizable = [name for name, (_, like) in base.items() if id(like) in tables]
    hashes = hash_samples([(*base[name], False) for name in base] + [(*base[name], True) for name in resizable])
    dtypes = {name: dtype_name(values) for name, (values, _) in base.items()}
    return {
        "source": name_or_path(root),
        "names": list(base),
        "hashes": hashes[: len(base)].clone(),
        "dtypes": list(dtypes.values()),
        "embeddings": {
            name: [logical(base[name][1]).shape[0], int(value), dtypes[name]]
            for name, value in zip(resizable, hashes[len(base) :].tolist(), strict=True)
        },
    }


def _named_base_tensors(root: nn.Module) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield the frozen tensors of the base as ``(clean name, values without any merged adapter, stored tensor)``.

    These are its parameters, and the running statistics of its batch normalisations.
    """
    layers = named_lora_layers(root).values()
    adapters = {id(p) for layer in layers for _, p in layer.named_adapter_tensors()}
    originals = {
        id(layer._parameters[name]): original
        for layer in layers
        for name, original in (layer.lora_original or {}).items()
    }
    whole = named_trained_whole(root)
    for name, parameter in root.named_parameters():
        clean = clean_name(name)
        if id(parameter) not in adapters and clean not in whole and not parameter.requires_grad:
            yield clean, originals.get(id(parameter), parameter.detach()), parameter
    for name, module in root.named_modules():
        if isinstance(module, FrozenStatistics):
            for buffer_name, buffer in module.named_buffers(clean_name(name), recurse=False):
                yield buffer_name, buffer, buffer


def remember_fingerprint(root: nn.Module) -> None:
    """Keep the fingerprint of a base that was just spread, so that one rank can ask for it. Called on all ranks."""
    require_injection(root).fingerprint = fingerprint(root)


def known_fingerprint(root: nn.Module) -> dict[str, Any]:
    """Return a base's fingerprint without communication: of a spread base, the one kept when it was spread."""
    injection = injection_of(root)
    kept = None if injection is None else injection.fingerprint
    return fingerprint(root) if kept is None or not any(map(is_sharded, root.parameters())) else kept


def renamed(recorded: Mapping[str, Any], rename: Callable[[str], str | None]) -> dict[str, Any]:
    """Return a fingerprint under other names; tensors that have none, and what is known of embeddings, are left out."""
    return {**_under(recorded, [rename(name) for name in recorded["names"]]), "embeddings": {}}


def without(recorded: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """Return a fingerprint without the tensors of these names."""
    embeddings = {name: value for name, value in recorded["embeddings"].items() if name not in names}
    kept = [None if name in names else name for name in recorded["names"]]
    return {**_under(recorded, kept), "embeddings": embeddings}


def _under(recorded: Mapping[str, Any], names: Sequence[str | None]) -> dict[str, Any]:
    kept = [index for index, name in enumerate(names) if name is not None]
    return {
        "source": recorded["source"],
        "names": [names[index] for index in kept],
        "hashes": recorded["hashes"][kept],
        "dtypes": [recorded["dtypes"][index] for index in kept],
    }


def first_difference(root: nn.Module, recorded: dict[str, Any]) -> str | None:
    """Return what first tells ``root`` from the recorded base, in words, or ``None`` if nothing does.

    Tensors without a fingerprint on either side, and float16 against another dtype (which rounds twice), are not
    compared.
    """
    own = fingerprint(root)
    named = {clean_name(name): tensor for name, tensor in [*root.named_parameters(), *root.named_buffers()]}
    lacking = next((name for name in recorded["names"] if name not in named and name not in own["names"]), None)
    if lacking is not None:
        return f"its base has a tensor {lacking!r}, which this model lacks"
    # a resize changes what has a row for each of an embedding's, as a head has. Only where all else is the same was the
    # base resized; another base has other embeddings too
    rows = {number for number, *_ in own["embeddings"].values()}
    resizable = {name for name, tensor in named.items() if tensor.ndim > 0 and logical(tensor).shape[0] in rows}
    difference = first_other_value(own, recorded, skipped=resizable)
    if difference is None:
        difference = _resized(own["embeddings"], recorded.get("embeddings", {}))
    return first_other_value(own, recorded) if difference is None else difference


def first_other_value(own: dict[str, Any], recorded: dict[str, Any], skipped: Collection[str] = ()) -> str | None:
    """Return which tensor of two fingerprints is the first of other values, in words; those of one alone are passed."""
    name = first_other_name(own, recorded, skipped)
    return None if name is None else f"the base tensor {name!r} holds other values"


def first_other_name(own: dict[str, Any], recorded: dict[str, Any], skipped: Collection[str] = ()) -> str | None:
    """Return the name of the first tensor whose values differ in two fingerprints."""
    own_hashes = dict(zip(own["names"], zip(own["hashes"].tolist(), own["dtypes"], strict=True), strict=True))
    for name, *theirs in zip(recorded["names"], recorded["hashes"].tolist(), recorded["dtypes"], strict=True):
        if name in own_hashes and name not in skipped and _differ(theirs, own_hashes[name]):
            return str(name)
    return None


def _differ(one: Sequence[Any], other: Sequence[Any]) -> bool:
    """Whether two pairs of a hash and a dtype are of other values."""
    (value, dtype), (other_value, other_dtype) = one, other
    return bool(value != other_value and (dtype == other_dtype or "float16" not in (dtype, other_dtype)))


def _resized(own: dict[str, list[Any]], recorded: dict[str, list[Any]]) -> str | None:
    """Return what tells embeddings apart that were resized, in words, or ``None``."""
    for name in recorded.keys() & own.keys():
        (rows, *last), (own_rows, *own_last) = recorded[name], own[name]
        if rows != own_rows:
            return (
                f"its {name!r} has {rows} rows, this model's {own_rows}: call "
                f"model.resize_token_embeddings({rows}) before the model is adapted"
            )
        if _differ(last, own_last):
            return (
                f"{name!r} holds other values in its last row. Rows that resize_token_embeddings adds are random: seed "
                "before it, or train them (trainable_token_indices, modules_to_save), so that they are in the file"
            )
    return None
