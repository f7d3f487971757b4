"""Fingerprint the frozen base, so that an adapter is loaded only onto the base that it was trained on."""

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.checkpoint.hashes import has_floats, hash_samples
from lightning_lora.checkpoint.packed import origins_of, packed_in, packed_weights
from lightning_lora.model.families import name_or_path
from lightning_lora.model.names import clean_name
from lightning_lora.model.side_effects import FrozenStatistics
from lightning_lora.model.spread import reshard
from lightning_lora.model.state import injection_of, named_lora_layers, named_trained_whole, require_injection
from lightning_lora.ops.sample_hash import dtype_name
from lightning_lora.ops.sharded import is_sharded, logical


def fingerprint(root: nn.Module) -> dict[str, Any]:
    """Return one integer per frozen tensor of the base, as ``{"source", "names", "hashes", "dtypes", ...}``.

    Each integer is a sum, over up to 64 positions that depend on the tensor's size alone, of a hash of the position and
    of the value there rounded to bfloat16. So it does not change with the precision that a base is loaded in. It tells
    one set of trained weights from another; it is no proof against a forger. Tensors on the meta device are left out.
    For ``"embeddings"`` the number of rows and a hash of the last one are kept too: rows that a resize added hold
    values of their own. Called on all ranks where the base is sharded.

    A quantised weight has the integer of the weight that it was made from, where that had values and its codes are
    still those. ``"packed"`` has its
    form and an integer of its codes, by which bases are compared where the weight itself is not known.
    """
    reshard(root)
    base = {name: (values, like) for name, values, like in _named_base_tensors(root) if has_floats(values, like)}
    tables = {id(m._parameters.get("weight")) for m in root.modules() if isinstance(m, nn.Embedding)}
    resizable = [name for name, (_, like) in base.items() if id(like) in tables]
    packed = packed_weights(root)
    parts = [(*base[name], False) for name in base] + [(*base[name], True) for name in resizable]
    hashes = hash_samples(parts + [(one.codes, one.like, False) for one in packed.values()])
    last_rows, codes = hashes[len(base) :].tolist()[: len(resizable)], hashes[len(parts) :].tolist()
    packed_hashes = dict(zip(packed, codes, strict=True))
    # the hash of the codes tells whether somebody has written into them since
    origins = {name: one for name, one in origins_of(root).items() if packed_hashes.get(name) == one.codes}
    dtypes = {name: dtype_name(values) for name, (values, _) in base.items()}
    return {
        "source": name_or_path(root),
        "names": [*base, *origins],
        "hashes": torch.cat(
            [hashes[: len(base)], torch.tensor([one.value for one in origins.values()], dtype=torch.int64)]
        ),
        "dtypes": [*dtypes.values(), *(one.dtype for one in origins.values())],
        "embeddings": {
            name: [logical(base[name][1]).shape[0], value, dtypes[name]]
            for name, value in zip(resizable, last_rows, strict=True)
        },
        "packed": {name: [one.form, packed_hashes[name]] for name, one in packed.items()},
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
        if name in layer._parameters
    }
    state = require_injection(root).merged
    originals |= {id(parameter): values for parameter, values in (() if state is None else state.cast)}
    whole = named_trained_whole(root)
    for name, parameter in root.named_parameters():
        clean = clean_name(name)
        values = originals.get(id(parameter), parameter.detach())
        is_base = id(parameter) not in adapters and clean not in whole and not parameter.requires_grad
        if is_base and isinstance(values, Tensor):  # not of a merged layer whose weight was quantised
            yield clean, values, parameter
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
    return {**_under(recorded, rename), "embeddings": {}}


def without(recorded: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """Return a fingerprint without the tensors of these names."""
    embeddings = {name: value for name, value in recorded["embeddings"].items() if name not in names}
    return {**_under(recorded, lambda name: None if name in names else name), "embeddings": embeddings}


def _under(recorded: Mapping[str, Any], rename: Callable[[str], str | None]) -> dict[str, Any]:
    names = [rename(name) for name in recorded["names"]]
    kept = [index for index, name in enumerate(names) if name is not None]
    return {
        "source": recorded["source"],
        "names": [names[index] for index in kept],
        "hashes": recorded["hashes"][kept],
        "dtypes": [recorded["dtypes"][index] for index in kept],
        "packed": {new: one for name, one in packed_in(recorded).items() if (new := rename(name)) is not None},
    }
