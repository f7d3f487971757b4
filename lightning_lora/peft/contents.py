"""What a PEFT directory of an adapted model holds: its config, and its tensors, which are made one layer at a time."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.model.names import clean_name
from lightning_lora.model.spread import reshard
from lightning_lora.ops.sharded import logical, whole
from lightning_lora.peft.adalora import as_lora as adalora_as_lora
from lightning_lora.peft.adalora import check_has_ranks
from lightning_lora.peft.config import kind_of
from lightning_lora.peft.describe import Entry
from lightning_lora.peft.directory import Files
from lightning_lora.peft.factors import with_one_rank
from lightning_lora.peft.layout import laid_out, parse_key
from lightning_lora.peft.portable import make_portable, read_factors


def described_tensors(root: nn.Module, description: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors of an adapted model that a description names, by name; of spread ones this rank's part."""
    reshard(root)
    needed = {name for _, _, names in description["entries"] for name in names}
    stored = {clean_name(name): tensor for name, tensor in root.state_dict(keep_vars=True).items()}
    return {name: tensor for name, tensor in stored.items() if name in needed}


def contents(
    description: Mapping[str, Any], named: Mapping[str, Tensor], *, portable: bool, as_lora: bool = False
) -> tuple[dict[str, Any], Iterator[tuple[str, Tensor]]]:
    """Return a directory's config, and an iterator over its tensors with their keys, which keeps none of them.

    Whatever can be refused is refused before the first tensor is made: by shapes, on the meta device, and by E of
    AdaLoRA, which tells the ranks. Spread tensors are gathered as they come: call and iterate on all ranks then.

    Args:
        description: what :func:`~lightning_lora.peft.describe.describe_for_peft` returned.
        named: the model's tensors by name. Those that are written as they are share their storage.
        portable, as_lora: as in :func:`~lightning_lora.save_peft`.

    Raises:
        ValueError: a tensor is missing, or the format, or with ``portable`` other readers, cannot express the adapter.
    """
    entries, config = description["entries"], description["config"]
    _check_there(description, named, portable)
    prunes = kind_of(config) == "ADALORA" and (portable or as_lora)
    reads = ("E",) if prunes else ()
    outline = {e[0]: _value(e, named, whole if parse_key(e[0]).kind in reads else _on_meta) for e in entries}
    plain = config
    if prunes:
        check_has_ranks(outline)
        plain, outline = adalora_as_lora(config, outline, keep_layers=portable)
    parameters, r, written = parameters_by_layer(entries), 0, plain
    if portable:
        layers = read_factors(Files(plain, outline, {}), "the adapter", parameters)
        r = max(factors.rank for factors in layers.values())
        written = with_one_rank(plain, layers, r)

    def made() -> Iterator[tuple[str, Tensor]]:
        for group in _by_layer(entries, factors_alone=portable):
            tensors = {entry[0]: _value(entry, named, whole) for entry in group}
            if prunes:
                tensors = adalora_as_lora(config, tensors, keep_layers=portable)[1]
            if portable:
                tensors = make_portable(plain, tensors, parameters, r)[1]
            for key in list(tensors):
                yield key, tensors.pop(key)

    return written, made()


def _value(entry: Entry, named: Mapping[str, Tensor], of: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the tensor of an entry, laid out from what ``of`` returns for the model's tensors."""
    _, layout, names = entry
    return laid_out(layout, [of(named[name]).detach() for name in names])


def _on_meta(tensor: Tensor) -> Tensor:
    """Return a tensor's whole shape and dtype without values."""
    return torch.empty(logical(tensor).shape, dtype=tensor.dtype, device="meta")


def _check_there(description: Mapping[str, Any], named: Mapping[str, Tensor], portable: bool) -> None:
    """Raise ``ValueError`` where PEFT would read the adapters of experts as something else, or lacks a tensor."""
    if description.get("only_portable") and not portable:
        raise ValueError(
            "PEFT reads adapters of experts with one rank and one scale, and this one has "
            f"{description['only_portable']}: write it with portable=True"
        )
    lacking = [name for _, _, names in description["entries"] for name in names if name not in named]
    if lacking:
        raise ValueError(
            f"PEFT expects {lacking[0]!r} in the file, since its module's name ends like that of one that trains "
            "whole, and the checkpoint holds no frozen tensors: load it into the model and call save_peft(model, "
            "directory)"
        )


def _by_layer(entries: Iterable[Entry], *, factors_alone: bool) -> list[list[Entry]]:
    """Return the entries of each adapted layer, and each other entry by itself, unless ``factors_alone``."""
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        kind, name, _ = parse_key(entry[0])
        is_factor = kind in ("A", "B", "E", "variant")  # AdaLoRA's A and B have keys of their own
        if is_factor or not factors_alone:
            groups.setdefault(name if is_factor else entry[0], []).append(entry)
    return list(groups.values())


def parameters_by_layer(entries: Iterable[Entry]) -> dict[str, str]:
    """Return the names of adapted parameters by the layers' names in the file, which does not tell them."""
    parsed = [(parse_key(key), names[0]) for key, _, names in entries]
    return {
        key.name: name.replace(".lora_A_", ".")
        for key, name in parsed
        if key.kind == "A" and ".lora_A_" in name and f"{key.name}.".startswith(f"{name.partition('.lora_A_')[0]}.")
    }
