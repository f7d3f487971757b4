"""The :class:`LoRAConfig` that a PEFT directory means on a model."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.config import LoRAConfig, brief
from lightning_lora.model.families import resize_advice
from lightning_lora.model.matching import hits, is_all_linear, layer_index, pattern_value
from lightning_lora.model.names import clean_name
from lightning_lora.model.targets import select_layers, select_parameters
from lightning_lora.peft.config import adalora_of, divisor, rank_of, scaling_of
from lightning_lora.peft.directory import Adapter
from lightning_lora.peft.layout import is_projection


def settings_of(
    model: nn.Module, adapter: Adapter, tensors: Mapping[str, Tensor], modules: Mapping[str, nn.Module]
) -> LoRAConfig:
    """Return our config for a directory, after checking that it describes the layers that there are tensors for.

    Args:
        tensors: what :func:`~lightning_lora.peft.fit.named_by_layer` returned.
    """
    given, pairs = adapter.config, adapter.factors
    # patterns and targets speak of an attention, and its output projection goes with it
    own = [name for name in pairs if not (is_projection(name, modules) and name.rpartition(".")[0] in pairs)]
    layers = [name for name in own if f"{name}.lora_A" in tensors]
    parameters = [name for name in own if name not in layers]
    whole = trained_modules(adapter, modules)
    options: dict[str, Any] = {name: bool(given.get(name)) for name in ("use_rslora", "use_dora", "lora_bias")}
    config = LoRAConfig(
        **_ranks_and_alphas(adapter, own, tensors),
        **_selection(adapter, layers, parameters, modules),
        dropout=0.0 if parameters else float(given.get("lora_dropout") or 0.0),
        target_parameters=parameters or None,
        trainable_token_indices=token_rows(adapter, model),
        modules_to_save=whole,
        bias=given.get("bias") or "none",
        **options,
        adalora=adalora_of(given),
        adapter_dtype="float64" if any(p["A"].dtype == torch.float64 for p in pairs.values()) else "float32",
    )
    described = set(select_layers(model, config, whole)) if config.target_modules else set()
    if parameters and described != set(layers) | (set(pairs) - set(own)):
        # PEFT takes layers named like parts of fused experts for those; the tensors say which ones it adapted
        config = replace(config, **_by_name(layers))
        described = set(select_layers(model, config, whole)) if layers else set()
    described |= set(select_parameters(model, config))
    if described != set(pairs):
        without, undescribed = sorted(described - set(pairs)), sorted(set(pairs) - described)
        raise ValueError(
            f"{adapter.source}: config and tensors disagree: no tensors for {without[:3]} ({len(without)} layers), "
            f"tensors that the config does not describe for {undescribed[:3]} ({len(undescribed)} layers). Is a "
            "file damaged, or from another model?"
        )
    return config


def _ranks_and_alphas(adapter: Adapter, own: list[str], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the fields for ranks and scales. Ranks are those of the tensors, with patterns that PEFT sorted too."""
    given, r = adapter.config, int(adapter.config["r"])
    ranks = {
        name: pair["A"].shape[0 if f"{name}.lora_A" in tensors else pair["A"].ndim - 2]
        for name, pair in adapter.factors.items()
    }
    other = next((name for name, rank in ranks.items() if rank != r), None)
    if other is not None and not given.get("rank_pattern"):
        raise ValueError(
            f"{adapter.source} has r={r} in its config, and tensors of rank {ranks[other]} for {other!r}. Is a file "
            "damaged?"
        )
    rank_pattern: dict[str, int] = _live_patterns(given.get("rank_pattern"), [*ranks])
    alpha_pattern: dict[str, float] = _live_patterns(given.get("alpha_pattern"), [*ranks])
    if given.get("ensure_weight_tying"):
        # a tied twin has the other's tensors, and is scaled by its own rank and alpha of the config all the same
        twins = [name for name in own if rank_of(given, name) != ranks[name]]
        scales = {name: scaling_of(given, name, rank_of(given, name)) for name in twins}
        alphas = {f"^{re.escape(name)}": scale * divisor(given, ranks[name]) for name, scale in scales.items()}
        alpha_pattern = {**alphas, **alpha_pattern}
    if any(pattern_value(rank_pattern, name, r) != ranks[name] for name in own):
        rank_pattern = {f"^{re.escape(name)}": ranks[name] for name in own if ranks[name] != r}
    alpha = float(given["lora_alpha"])
    return {"r": r, "alpha": alpha, "rank_pattern": rank_pattern, "alpha_pattern": alpha_pattern}


def _selection(
    adapter: Adapter, layers: list[str], parameters: list[str], modules: Mapping[str, nn.Module]
) -> dict[str, Any]:
    """Return the fields that say which layers are adapted; PEFT's lists may name more than the model has."""
    given = adapter.config
    if given.get("ensure_weight_tying"):
        return _by_name(layers)  # PEFT adapts tied twins of the targets too
    targets, patterns = _live(given["target_modules"], modules), given.get("layers_pattern") or None
    # weights of layers among the parameters: layers of fused experts' names, see describe
    named_there = any(hits(given.get("target_parameters") or [], f"{name}.weight") for name in adapter.factors)
    if (targets and is_all_linear(targets)) or (named_there and not parameters):
        targets = layers  # what the word means differs with the library and its version: the tensors say
    indices = given.get("layers_to_transform")
    if isinstance(indices, list):
        there = {layer_index(name, patterns) for name in modules}
        indices = [index for index in indices if index in there]
    return {
        "target_modules": targets,
        "exclude_modules": _live(given.get("exclude_modules"), modules) or None,
        "layers_to_transform": indices,
        "layers_pattern": patterns,
    }


def _by_name(layers: list[str]) -> dict[str, Any]:
    """Return the same fields for layers that are named one by one."""
    return {"target_modules": layers, "exclude_modules": None, "layers_to_transform": None, "layers_pattern": None}


def _live_patterns(patterns: Any, names: Sequence[str]) -> dict[str, Any]:
    """Return the patterns that match an adapted layer; PEFT ignores the others."""
    return {key: value for key, value in (patterns or {}).items() if pattern_value({key: True}, names, False)}


def _live(targets: Any, modules: Mapping[str, nn.Module]) -> Any:
    """Return the entries of a list that name something; PEFT's lists may name more than the model has."""
    if targets is None or isinstance(targets, str):
        return targets
    return sorted(target for target in targets if any(hits([target], name) for name in modules))


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
            raise ValueError(trained_a_copy(f"{source} trained rows of {name + '.weight'!r}", first, model, name))
        found[name] = list(matches[0])
    if wanted and not found:
        raise ValueError(f"{source} names trainable_token_indices, but has no rows for them: is a file damaged?")
    return found


def trained_modules(adapter: Adapter, modules: Mapping[str, nn.Module]) -> list[str]:
    """Return the modules that PEFT's ``modules_to_save`` means here; the directory must have all of their tensors."""
    entries = adapter.config.get("modules_to_save") or []
    found = [name for name in modules if name and any(name.endswith(entry) for entry in entries)]
    trained: list[str] = []
    for name in found:
        own = {f"{name}.{clean_name(local)}": p for local, p in modules[name].named_parameters()}
        missing = [tensor for tensor in own if tensor not in adapter.trained]
        # the full name of one module may be the end of another's, which did not train
        if not any(name.endswith(entry) and (entry == name or entry not in modules) for entry in entries) and (
            missing or all(is_value(adapter.trained[tensor], p) for tensor, p in own.items())
        ):
            continue
        if missing:
            raise ValueError(
                f"{adapter.source} says modules_to_save={brief(entries)}, but has no {missing[0]!r}. Is a file damaged?"
            )
        trained.append(name)
    return [name for name in trained if any(tensor.startswith(f"{name}.") for tensor in adapter.trained)]


def trained_a_copy(trained: str, twin: str, model: nn.Module, module: str) -> str:
    """Say that PEFT trained a copy of a tensor that is tied to ``twin`` here, and how to untie ``module``."""
    return (
        f"{trained} apart from {twin!r}, which is the same tensor in {type(model).__name__}: PEFT trained a copy. "
        f"Untie them before: set model.config.tie_word_embeddings = False and give {module!r} a copy, "
        "module.weight = nn.Parameter(module.weight.detach().clone())"
    )


def is_value(value: Tensor, own: Tensor) -> bool:
    """Return whether a file's tensor holds the values that the model's own has."""
    return not own.is_meta and torch.equal(value.to(own.dtype), own.detach().cpu())
