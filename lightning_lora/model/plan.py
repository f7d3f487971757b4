"""Decide what an injection will do to a model, and check all of it, before anything is changed."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from lightning_lora.config import LoRAConfig, Quantization
from lightning_lora.layers.base import Part
from lightning_lora.layers.parameters import LoRAParameters
from lightning_lora.layers.quantized_model import num_parameters
from lightning_lora.layers.registry import is_linear
from lightning_lora.layers.token_rows import check_rows
from lightning_lora.model.base_form import QuantizationPlan, check_form, check_not_foreign, quantization_of
from lightning_lora.model.layer_plan import LayerPlan, Plan, RowsPlan
from lightning_lora.model.matching import check_patterns, is_all_linear, pattern_value
from lightning_lora.model.names import named_modules
from lightning_lora.model.quantize import plan_quantization
from lightning_lora.model.state import uncompiled
from lightning_lora.model.targets import Chosen, choose_mixin, select_layers, select_parameters
from lightning_lora.model.trained_base import base_that_trains, new_heads, select_token_rows, select_trained_whole
from lightning_lora.model.untouched import check_untouched


def plan(
    model: nn.Module,
    config: LoRAConfig | None = None,
    *,
    quantize: Quantization | None = None,
    quantize_exclude: str | Sequence[str] | None = None,
    check_ranks: bool = True,
) -> Plan:
    """Decide and check all that :func:`~lightning_lora.inject` would do to ``model``, and change nothing.

    Args:
        config: ``None`` is ``LoRAConfig()``.
        quantize, quantize_exclude: as in :func:`~lightning_lora.inject`; the plan says the bytes of the base.
        check_ranks: refuse a rank above a layer's size; files of PEFT may hold such ranks.

    Returns:
        A sequence of :class:`~lightning_lora.LayerPlan`, one for each low-rank pair. ``print(plan)`` is a table.

    Raises:
        ValueError: the config hits nothing, the wrong kind of module, or what cannot be adapted as it says, or the
            model is already adapted (here or by PEFT). The message names the module and the remedy.

    Example::

        >>> import torch
        >>> from lightning_lora import LoRAConfig, plan
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))
        >>> decided = plan(model, LoRAConfig(r=4, target_modules=["0"], modules_to_save=["2"]))
        >>> print(decided)
        LoRA for Sequential: 1 pair, 324 parameters train, 544 are frozen
          name  kind    size      r  scaling  dropout  parameters
          0     Linear  16 -> 32  4        2        0         192
          trained whole: 2.weight, 2.bias (132 parameters)
        >>> decided[0].r, decided.num_trainable
        (4, 324)
    """
    config = LoRAConfig() if config is None else config
    if not isinstance(config, LoRAConfig):
        hint = ": write LoRAConfig.from_peft(config)" if hasattr(config, "peft_type") else ""
        raise TypeError(f"config must be a LoRAConfig, got {type(config).__name__}{hint}")
    model = uncompiled(model)
    check_untouched(model)
    if quantize is not None:
        check_not_foreign(named_modules(model))
    elif quantize_exclude is not None:
        raise ValueError(f"quantize_exclude={quantize_exclude!r} needs quantize='nf4', 'nf4-dq' or 'int8'")
    to_save = config.modules_to_save
    trained_whole = new_heads(model) if to_save is None else select_trained_whole(model, to_save)
    layers = select_layers(model, config, trained_whole)
    parameters = select_parameters(model, config)
    tables = select_token_rows(model, config)
    modules = named_modules(model)
    _check_apart(modules, layers, parameters, tables)
    names = {module: name for name, module in modules.items()}
    rows = []
    for name, (table, tied, ids) in tables.items():
        check_rows(table, ids)
        width = table.get_parameter("weight").shape[1]
        rows.append(RowsPlan(name, tuple(names[one] for one in tied), tuple(ids), len(ids) * width))
    pairs, capped = _pairs(modules, layers, parameters, config, check_ranks=check_ranks)
    adapted = [modules[name] for name in {layer for layer, _ in (layers | parameters).values()}]
    adapted += [module for table, tied, _ in tables.values() for module in (table, *tied)]
    trained = base_that_trains(model, trained_whole, adapted, config.bias)
    keep = dict.fromkeys(trained_whole, "trains whole")
    own = [layer for layer, _ in parameters.values() if is_linear(modules[layer])]
    keep |= dict.fromkeys(own, "adapted by target_parameters")
    keep |= {names[one]: "rows of it train" for table, tied, _ in tables.values() for one in (table, *tied)}
    quantization = None if quantize is None else _plan_base(model, quantize, quantize_exclude, keep)
    about = (quantization, type(model).__name__, num_parameters(model), model)
    return Plan(config, pairs, tuple(rows), tuple(trained_whole), trained, capped, *about)


def _plan_base(
    model: nn.Module, kind: Quantization, exclude: str | Sequence[str] | None, keep: Mapping[str, str]
) -> QuantizationPlan:
    """Return how the base will be quantised, or how it was by an earlier run with the same settings."""
    former = quantization_of(model)
    if former is None:
        return plan_quantization(model, kind, exclude=exclude, keep=keep)
    check_form(former, kind, exclude)
    return former


def _check_apart(
    modules: Mapping[str, nn.Module], layers: Chosen, parameters: Chosen, tables: Mapping[str, tuple[Any, ...]]
) -> None:
    """Raise ``ValueError`` for a module that two options name."""
    adapted = {id(modules[layer]): name for name, (layer, _) in layers.items()}
    for module, _ in parameters.values():
        if module in layers:
            raise ValueError(f"{module!r} is in target_modules and has a parameter in target_parameters: name it once")
    for name, (embedding, heads, _) in tables.items():
        for module in (embedding, *heads):
            if id(module) in adapted:
                raise ValueError(
                    f"{adapted[id(module)]!r} is adapted, and trainable_token_indices trains rows of the same weight "
                    f"(of {name!r}): leave it out with exclude_modules, or adapt it without trainable_token_indices"
                )


def _pairs(
    modules: Mapping[str, nn.Module], layers: Chosen, parameters: Chosen, config: LoRAConfig, *, check_ranks: bool
) -> tuple[tuple[LayerPlan, ...], dict[str, int]]:
    """Return the plan of every pair, and the ranks that became their layer's size."""
    chosen = layers | parameters
    found = {name: _decide(modules, name, *chosen[name], layers, config) for name in chosen}
    check_patterns(config, dict.fromkeys([*found, *(layer for layer, _ in layers.values())]))
    # at the scale of the rank that was asked for: B A can be the same matrices
    capped = _capped(config, [found[name] for name in layers])
    plans = []
    for name, pair in found.items():
        pair = replace(pair, r=capped.get(name, pair.r))
        if check_ranks:
            _check_rank(pair)
        plans.append(replace(pair, num_parameters=_num_parameters(pair, modules[pair.layer], chosen[name][1], config)))
    return tuple(plans), capped


def _decide(
    modules: Mapping[str, nn.Module], name: str, layer: str, part: Part, layers: Chosen, config: LoRAConfig
) -> LayerPlan:
    module, is_layer = modules[layer], name in layers
    mixin = choose_mixin(modules, layer, config) if is_layer else LoRAParameters
    # an attention's output projection takes the attention's rank and scale
    parent = name.rpartition(".")[0]
    of_attention = parent in layers and isinstance(modules[parent], nn.MultiheadAttention)
    keys = [parent] if of_attention else [name, layer] if is_layer else [name]
    r = pattern_value(config.rank_pattern, keys, config.r)
    scaling = config.scaling(r, pattern_value(config.alpha_pattern, keys, config.alpha))
    kind = type(module).__name__ if is_layer else "matrix"
    features = part.features or mixin.features(module)
    return LayerPlan(name, layer, part.local, kind, mixin, *features, r=r, scaling=scaling, dropout=config.dropout)


def _num_parameters(pair: LayerPlan, module: nn.Module, part: Part, config: LoRAConfig) -> int:
    """Return how many parameters a pair brings, after checking that its factors can have their shapes and start."""
    r = pair.r
    if part.features is not None:  # of a part, whose factors are matrices or stacks of them
        dimensions = 2 if part.matrices == 1 else 3
        total = part.matrices * r * sum(part.features)
    else:
        try:
            shapes = pair.mixin.shapes(module, r)
        except ValueError as error:
            raise ValueError(f"{pair.name!r} cannot be adapted: {error}") from None
        dimensions = len(shapes[0])
        total = sum(map(math.prod, (*shapes, *pair.mixin.more_shapes(module, r).values())))
    if pair.mixin.uses_init and config.init == "orthogonal" and (r % 2 or dimensions > 2):
        what = f"r={r}" if dimensions == 2 else f"factors of {dimensions} dimensions"
        raise ValueError(
            f"init='orthogonal' needs matrices of even rank, and {pair.name!r} has {what}: give it another rank with "
            "rank_pattern, leave it out with exclude_modules, or take another init"
        )
    return total


def _capped(config: LoRAConfig, layers: Sequence[LayerPlan]) -> dict[str, int]:
    """Return the ranks of the layers that are smaller than what was asked for, if any may be that small.

    A sweep over all linear layers may meet a gate with one output; a rank above all sizes is a mistake.
    """
    if not is_all_linear(config.target_modules):
        return {}
    largest = max((max(pair.in_features, pair.out_features) for pair in layers), default=0)
    sizes = {pair.name: min(pair.in_features, pair.out_features) for pair in layers}
    return {pair.name: sizes[pair.name] for pair in layers if sizes[pair.name] < pair.r <= largest}


def _check_rank(pair: LayerPlan) -> None:
    size = min(pair.in_features, pair.out_features)
    if pair.r > size:
        raise ValueError(
            f"r={pair.r} is larger than {pair.name!r}, a {pair.in_features} -> {pair.out_features} {pair.kind}: give "
            f"it its own rank with rank_pattern={{{pair.name!r}: {size}}}, train it whole with modules_to_save, or "
            "leave it out with exclude_modules"
        )
