"""What a PEFT directory holds besides low-rank pairs: modules that trained whole, rows of tokens, tied copies."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.config import brief
from lightning_lora.model.families import resize_advice
from lightning_lora.model.names import clean_name
from lightning_lora.model.state import injection_of
from lightning_lora.peft.directory import Adapter


def set_copies_apart(adapter: Adapter, modules: Mapping[str, nn.Module]) -> None:
    """Move embeddings and heads that did not train, which PEFT may copy into the file, from ``trained`` to ``base``."""
    whole = _whole(adapter)
    for name in list(adapter.trained):
        owner, _, local = name.rpartition(".")
        if local == "weight" and not any(_is_within(owner, entry) for entry in whole) and owner in modules:
            adapter.base[name] = adapter.trained.pop(name)


def check_ties(model: nn.Module, adapter: Adapter, modules: Mapping[str, nn.Module]) -> None:
    """Raise ``ValueError`` where PEFT trained a copy of a tensor that is tied to another module's in this model.

    Twins of equal values trained together, and both count as trained.
    """
    whole = _whole(adapter)
    twins: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        twins.setdefault(id(parameter), []).append(clean_name(name))
    for group in twins.values():
        copied = [n for n in group if n in adapter.trained and any(_is_within(_owner_of(n), e) for e in whole)]
        for name in group if copied else []:
            if modules[_owner_of(name)] is modules[_owner_of(copied[0])]:
                continue
            value = adapter.trained.get(name, adapter.base.get(name))
            if value is None or not torch.equal(value, adapter.trained[copied[0]]):
                raise ValueError(_apart(f"{adapter.source} trained {copied[0]!r}", name, model, _owner_of(name)))
            adapter.trained[name] = value
            adapter.base.pop(name, None)


def _apart(trained: str, twin: str, model: nn.Module, module: str) -> str:
    return (
        f"{trained} apart from {twin!r}, which is the same tensor in {type(model).__name__}: PEFT trained a copy. "
        f"Untie them before: set model.config.tie_word_embeddings = False and give {module!r} a copy, "
        "module.weight = nn.Parameter(module.weight.detach().clone())"
    )


def untrained_values(model: nn.Module, adapter: Adapter) -> list[str]:
    """Return the base tensors that a file brings and the adapted model does not train, where they differ from it."""
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    injection = injection_of(model)
    whole = [] if injection is None else injection.trained_whole
    own = {clean_name(n): t for n, t in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]}
    return [
        name
        for name, value in adapter.trained.items()
        if id(own[name]) not in trained
        and not any(name.startswith(f"{module}.") for module in whole)
        and not _is_value(value, own[name])
    ]


def token_rows(adapter: Adapter, model: nn.Module) -> dict[str, list[int]] | None:
    """Return the trained rows' indices by embedding, which must be those that the file has rows for."""
    wanted, source = adapter.config.get("trainable_token_indices"), adapter.source
    if not wanted and not adapter.rows:
        return None
    lists = list(wanted.values()) if isinstance(wanted, Mapping) else [wanted or []]
    entries = list(wanted) if isinstance(wanted, Mapping) else [""]
    found: dict[str, list[int]] = {}
    for name, rows in adapter.rows.items():
        matches = [ids for entry, ids in zip(entries, lists, strict=True) if name.endswith(entry)]
        if not matches or len(matches[0]) != rows.shape[0]:
            raise ValueError(
                f"{source} has {rows.shape[0]} trained rows for {name!r}; its trainable_token_indices list "
                f"{len(matches[0]) if matches else 0}"
            )
        tables = dict(model.named_parameters(remove_duplicate=False))
        table: Any = tables.get(f"{name}.weight")
        if table is None or table.ndim != 2 or table.shape[1:] != rows.shape[1:] or max(matches[0]) >= table.shape[0]:
            there = "no such embedding" if table is None else f"a table of {tuple(table.shape)}"
            recorded = (adapter.metadata.get("base") or {}).get("embeddings", {}).get(f"{name}.weight")
            needed = (recorded[0] if recorded else max(matches[0]) + 1, rows.shape[-1])
            advice = "" if table is None else resize_advice(model, f"{name}.weight", needed, table.shape)
            raise ValueError(
                f"{source} trains rows up to {max(matches[0])} of width {rows.shape[-1]} of {name!r}, the model has "
                f"{there}" + (advice or ": another base model?")
            )
        first = next(twin for twin, parameter in tables.items() if parameter is table)
        if first != f"{name}.weight":  # PEFT lets what is tied to an input embedding follow, and nothing else
            raise ValueError(_apart(f"{source} trained rows of {name + '.weight'!r}", first, model, name))
        found[name] = list(matches[0])
    if wanted and not found:
        raise ValueError(f"{source} names trainable_token_indices, but has no rows for them: is a file damaged?")
    return found


def check_trained(model: nn.Module, adapter: Adapter) -> list[tuple[Tensor, int, Tensor]]:
    """Check the base tensors in a directory: those that trained must fit, untrained copies must be the model's own.

    Returns:
        ``(table, first row, rows)`` for every embedding whose copy differs in its last rows: rows that were added.
    """
    own = {clean_name(n): t for n, t in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]}
    for name, value in (adapter.trained | adapter.base).items():
        if name not in own:
            raise ValueError(
                f"{adapter.source} holds {name!r}, which {type(model).__name__} lacks: another base model?"
            )
        if value.shape != own[name].shape:
            hint = resize_advice(model, name, value.shape, own[name].shape)
            raise ValueError(
                f"{adapter.source} has {tuple(value.shape)} for {name!r}, the model has {tuple(own[name].shape)}{hint}"
            )
        if value.is_floating_point() != own[name].is_floating_point():  # a batch normalisation counts its batches
            raise ValueError(f"{adapter.source} has {value.dtype} for {name!r}, the model has {own[name].dtype}")
    tails: list[tuple[Tensor, int, Tensor]] = []
    for name, value in adapter.base.items():
        if own[name].device.type == "meta":
            continue
        differs = value.bfloat16() != own[name].detach().cpu().bfloat16()
        if not bool(differs.any()):
            continue
        first = int(differs.flatten(1).any(1).nonzero()[0]) if value.ndim > 1 else 0
        if first < value.shape[0] // 2:
            raise ValueError(
                f"{adapter.source} brings its own base tensor {name!r}, which differs from the model's (a trained "
                "embedding, or another base): load that base first"
            )
        tails.append((own[name].detach(), first, value[first:]))
    return tails


def trained_modules(adapter: Adapter, modules: Mapping[str, nn.Module]) -> list[str]:
    """Return the modules that PEFT's ``modules_to_save`` means here; the directory must have all of their tensors."""
    entries = _whole(adapter)
    found = [name for name in modules if name and any(name.endswith(entry) for entry in entries)]
    trained: list[str] = []
    for name in found:
        own = {f"{name}.{clean_name(local)}": p for local, p in modules[name].named_parameters()}
        missing = [tensor for tensor in own if tensor not in adapter.trained]
        # the full name of one module may be the end of another's, which did not train
        if not any(name.endswith(entry) and (entry == name or entry not in modules) for entry in entries) and (
            missing or all(_is_value(adapter.trained[tensor], p) for tensor, p in own.items())
        ):
            continue
        if missing:
            raise ValueError(
                f"{adapter.source} says modules_to_save={brief(list(entries))}, but has no {missing[0]!r}. Is a file "
                "damaged?"
            )
        trained.append(name)
    return [name for name in trained if any(tensor.startswith(f"{name}.") for tensor in adapter.trained)]


def _whole(adapter: Adapter) -> tuple[str, ...]:
    return tuple(adapter.config.get("modules_to_save") or [])


def _is_value(value: Tensor, own: Tensor) -> bool:
    return not own.is_meta and torch.equal(value.to(own.dtype), own.detach().cpu())


def _owner_of(name: str) -> str:
    return name.rpartition(".")[0]


def _is_within(owner: str, entry: str) -> bool:
    """Whether a module lies in one whose name ends with ``entry``."""
    parts = owner.split(".")
    return any(".".join(parts[:end]).endswith(entry) for end in range(1, len(parts) + 1))
