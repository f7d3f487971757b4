"""What an injection will do to a model, planned and checked before anything is changed."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_lora.config import LoRAConfig
from lightning_lora.layers import LoRALayer, mixin_for, read_mixin, with_options
from lightning_lora.layers.embedding import LoRAEmbedding
from lightning_lora.layers.parameters import sizes_of_parameter
from lightning_lora.layers.read_weight import check_rescaled, reader_of
from lightning_lora.layers.residual import RESIDUAL
from lightning_lora.layers.token_rows import check_rows
from lightning_lora.megatron.layers import LoRAMegatronLinear
from lightning_lora.megatron.names import megatron_parts
from lightning_lora.megatron.served import check_biases, check_options
from lightning_lora.model.heads import new_heads
from lightning_lora.model.matching import (
    check_patterns,
    is_all_linear,
    pattern_value,
    select_layers,
    select_parameters,
    select_token_rows,
    select_trained_whole,
)
from lightning_lora.model.names import clean_name, joined


@dataclass
class Plan:
    """What an injection will do to a model. All that can be checked beforehand has been checked.

    Attributes:
        modules: all modules of the model, by clean name.
        layers: modules to adapt, by name; of a layer of Megatron-core each part that it stacks.
        mixins: what adapts each of them.
        ranks: by the name of the pair, a layer's or a parameter's.
        scales: the factor of each pair, in the same way.
        capped: the ranks of the layers that are smaller than the rank that was asked for.
        parts: the parts of Megatron-core's layers, by name.
        parameters: parameters to adapt, by the name of their module.
        rows: tables with rows that train, as :func:`select_token_rows` gives them.
        trained_whole: names of the modules, and of parameters of models, that train whole.
    """

    modules: dict[str, nn.Module]
    layers: dict[str, nn.Module]
    mixins: dict[str, type[LoRALayer]]
    ranks: dict[str, int]
    scales: dict[str, float]
    capped: dict[str, int]
    parts: dict[str, Any]
    parameters: dict[str, list[str]]
    rows: dict[str, tuple[nn.Module, list[nn.Module], list[int]]]
    trained_whole: list[str]


def planned(model: nn.Module, config: LoRAConfig, *, check_ranks: bool) -> Plan:
    """Decide what becomes of a model that holds no adapters; ``check_ranks=False`` takes ranks above a layer's size.

    Raises:
        ValueError: the config hits nothing, the wrong kind of module, or what cannot be adapted as it says.
    """
    trained_whole = _modules_trained_whole(model, config)
    layers = select_layers(model, config, trained_whole)
    parameters = select_parameters(model, config)
    rows = select_token_rows(model, config)
    _check_apart(layers, parameters, rows)
    for table, _, token_ids in rows.values():
        check_rows(table, token_ids)
    modules = {clean_name(name): module for name, module in model.named_modules()}
    mixins = {name: _mixin(modules, name, layer, config) for name, layer in layers.items()}
    pairs = [*layers, *(joined(name, local) for name, locals_ in parameters.items() for local in locals_)]
    parts = {part.name: part for found in megatron_parts(model, fused=config.fused_pairs).values() for part in found}
    check_patterns(config, [*pairs, *(parts[name].layer for name in layers if name in parts)])
    if config.bias == "all":
        check_biases(model, {parts[name].layer for name in layers if name in parts})
    keys = {
        name: (parts[name].name, parts[name].layer) if name in parts else _rank_name(layers, name) for name in pairs
    }
    ranks = {name: pattern_value(config.rank_pattern, keys[name], config.r) for name in pairs}
    scales = {
        name: config.scaling(r, pattern_value(config.alpha_pattern, keys[name], config.alpha))
        for name, r in ranks.items()
    }
    sizes = {
        name: (mixins[name].features(layer)[0], parts[name].rows) if name in parts else mixins[name].features(layer)
        for name, layer in layers.items()
    }
    # at the scale of the rank that was asked for: B A can be the same matrices
    capped = _capped(config, ranks, sizes)
    ranks |= capped
    plan = Plan(modules, layers, mixins, ranks, scales, capped, parts, parameters, rows, trained_whole)
    _check_pairs(plan, sizes, config, check_ranks=check_ranks)
    return plan


def _modules_trained_whole(model: nn.Module, config: LoRAConfig) -> list[str]:
    if config.modules_to_save is not None:
        return select_trained_whole(model, config.modules_to_save)
    return new_heads(model)


def _check_apart(
    layers: Mapping[str, nn.Module], parameters: Mapping[str, Any], rows: Mapping[str, tuple[Any, ...]]
) -> None:
    """Raise ``ValueError`` for a module that two options name."""
    adapted = {id(layer): name for name, layer in layers.items()}
    for name in parameters:
        if name in layers:
            raise ValueError(f"{name!r} is in target_modules and has a parameter in target_parameters: name it once")
    for name, (embedding, heads, _) in rows.items():
        for module in (embedding, *heads):
            if id(module) in adapted:
                raise ValueError(
                    f"{adapted[id(module)]!r} is adapted, and trainable_token_indices trains rows of the same weight "
                    f"(of {name!r}): leave it out with exclude_modules, or adapt it without trainable_token_indices"
                )


def _mixin(modules: Mapping[str, nn.Module], name: str, layer: nn.Module, config: LoRAConfig) -> type[LoRALayer]:
    """Return the mixin for a layer, by its type, by how its parent uses it and by how it starts."""
    mixin = mixin_for(layer)
    assert mixin is not None
    if issubclass(mixin, LoRAMegatronLinear):
        check_options(name, config)
        return mixin
    check_rescaled(modules, name)
    reader = reader_of(modules, name)
    if reader is not None:
        try:
            mixin = read_mixin(mixin, layer, reader)
        except ValueError as error:
            raise ValueError(f"{name!r} cannot be adapted: {error}") from None
    try:
        mixin = with_options(mixin, layer, use_dora=config.use_dora, lora_bias=config.lora_bias)
    except ValueError as error:
        option = "use_dora" if config.use_dora else "lora_bias"
        raise ValueError(
            f"{name!r} cannot be adapted with {option}=True: {error}. Leave the layer out with exclude_modules, or "
            f"give {option}=False"
        ) from None
    if not config.starts_from_base or issubclass(mixin, LoRAEmbedding):
        return mixin
    residual = RESIDUAL.get(mixin)
    weight = layer._parameters.get("weight")
    if residual is None or weight is None or weight.device.type == "meta" or not weight.is_floating_point():
        why = "its weight is on the meta device" if weight is not None and weight.is_meta else type(layer).__name__
        raise ValueError(
            f"init={config.init!r} starts from the weights of linear layers, and {name!r} has none to start from "
            f"({why}): load the base first, or leave the layer out with exclude_modules"
        )
    return residual


def _rank_name(layers: Mapping[str, nn.Module], name: str) -> str:
    """Return the name that patterns are matched with: an attention's output projection takes the attention's."""
    parent = name.rpartition(".")[0]
    return parent if isinstance(layers.get(parent), nn.MultiheadAttention) else name


def _check_pairs(plan: Plan, sizes: Mapping[str, tuple[int, int]], config: LoRAConfig, *, check_ranks: bool) -> None:
    """Raise ``ValueError`` for a rank that a layer or parameter cannot have."""
    for name, layer in plan.layers.items():
        if check_ranks:
            _check_rank(name, type(layer).__name__, sizes[name], plan.ranks[name])
        _check_shapes(name, layer, plan.mixins[name], plan.ranks[name], config)
    for name, locals_ in plan.parameters.items():
        for local in locals_:
            pair = joined(name, local)
            experts, *own = sizes_of_parameter(plan.modules[name], local)
            if check_ranks:
                _check_rank(pair, "matrix", (own[0], own[1]), plan.ranks[pair])
            _check_start(pair, plan.ranks[pair], 2 if experts == 1 else 3, config)


def _check_shapes(name: str, layer: nn.Module, mixin: type[LoRALayer], r: int, config: LoRAConfig) -> None:
    try:
        shape, _ = mixin.shapes(layer, r)
    except ValueError as error:
        raise ValueError(f"{name!r} cannot be adapted: {error}") from None
    if not issubclass(mixin, LoRAEmbedding):  # which starts as PEFT's embeddings do, whatever the init
        _check_start(name, r, len(shape), config)


def _check_start(name: str, r: int, num_dimensions: int, config: LoRAConfig) -> None:
    if config.init == "orthogonal" and (r % 2 or num_dimensions > 2):
        what = f"r={r}" if num_dimensions == 2 else f"factors of {num_dimensions} dimensions"
        raise ValueError(
            f"init='orthogonal' needs matrices of even rank, and {name!r} has {what}: give it another rank with "
            "rank_pattern, leave it out with exclude_modules, or take another init"
        )


def _capped(config: LoRAConfig, ranks: Mapping[str, int], sizes: Mapping[str, tuple[int, int]]) -> dict[str, int]:
    """Return the ranks of the layers that are smaller than what was asked for, if any may be that small.

    A sweep over all linear layers may meet a gate with one output; a rank above all sizes is a mistake.
    """
    largest = max((size for pair in sizes.values() for size in pair), default=0)
    if not is_all_linear(config.target_modules):
        return {}
    return {name: min(pair) for name, pair in sizes.items() if min(pair) < ranks[name] <= largest}


def _check_rank(name: str, kind: str, sizes: tuple[int, int], r: int) -> None:
    if r > min(sizes):
        raise ValueError(
            f"r={r} is larger than {name!r}, a {sizes[0]} -> {sizes[1]} {kind}: give it its own rank with "
            f"rank_pattern={{{name!r}: {min(sizes)}}}, train it whole with modules_to_save, or leave it out with "
            "exclude_modules"
        )
