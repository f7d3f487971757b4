"""Choose the layers and parameters to adapt, and the class that adapts each: what the config means in a model."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from lightning_lora.config import LoRAConfig, brief
from lightning_lora.layers import LoRALayer, mixin_for, read_mixin, with_options
from lightning_lora.layers.base import Part
from lightning_lora.layers.parameters import own_parameters, sizes_of_parameter
from lightning_lora.layers.read_weight import check_rescaled, reader_of
from lightning_lora.layers.registry import RESIDUAL, dense_weight
from lightning_lora.layers.stored import stored_form
from lightning_lora.model.families import families_in
from lightning_lora.model.matching import all_linear, check_hits, check_indices, hits, is_all_linear, is_target
from lightning_lora.model.names import clean_name, is_inside_any, joined, named_modules, nearest_names

Chosen = dict[str, tuple[str, Part]]  # by the name of the pair: its layer, and which part of it


def select_layers(model: nn.Module, config: LoRAConfig, trained_whole: Sequence[str]) -> Chosen:
    """Return the layers to adapt, each with its own name in the model, by the name that patterns know them by.

    They come in ``named_modules`` order. A layer that stacks several weights comes once for each; a pattern may name
    the layer or the weight.

    Args:
        trained_whole: names of modules that train whole; they and their children are left out.

    Raises:
        ValueError: a pattern hits nothing, or hits a module of a kind that cannot be adapted.
    """
    modules = named_modules(model)
    units = _units(modules, fused=config.fused_pairs)
    known = dict.fromkeys(name for name in (*modules, *units) if name)
    _check_stacked(config, modules, known)
    for field in ("target_modules", "exclude_modules"):
        check_hits(field, getattr(config, field), known, type(model).__name__)
    if not config.target_modules:
        return {}
    selected = {
        name: (layer, part)
        for name, (layer, part) in _candidates(model, config, modules, units).items()
        if not any(hits(config.exclude_modules, n) for n in (name, layer)) and not is_inside_any(layer, trained_whole)
    }
    for family in families_in(model):
        family.check(model, config, {layer for layer, _ in selected.values()})
    if not selected:
        raise ValueError(
            f"target_modules={brief(config.target_modules)} leaves no layer of {type(model).__name__} to adapt after "
            f"exclude_modules={brief(config.exclude_modules)} and the modules that train whole, "
            f"{brief(list(trained_whole))}"
        )
    for name, (layer, _) in selected.items():
        _check_kind(name, modules[layer])
    return selected


def _units(modules: Mapping[str, nn.Module], *, fused: bool) -> Chosen:
    """Return what can be named to be adapted, right or wrong: every module, or each part that it stacks instead."""
    units: Chosen = {}
    for name, module in modules.items():
        if name:
            mixin = mixin_for(module)
            parts = [Part(name)] if mixin is None else mixin.parts(modules, name, fused=fused)
            units |= {part.name: (name, part) for part in parts}
    return units


def _candidates(model: nn.Module, config: LoRAConfig, modules: Mapping[str, nn.Module], units: Chosen) -> Chosen:
    """Return what the targets mean, before anything is left out."""
    if is_all_linear(config.target_modules):
        linear = all_linear(model)
        return {name: (layer, part) for name, (layer, part) in units.items() if layer in linear}
    meant = {name for name, (layer, _) in units.items() if is_target(name, config) or is_target(layer, config)}
    check_indices(config, dict.fromkeys([*modules, *units]))
    # the output projection of an attention is read by it, and adapted with it, as in PEFT
    meant |= {f"{name}.out_proj" for name in meant if isinstance(modules.get(name), nn.MultiheadAttention)}
    return {name: unit for name, unit in units.items() if name in meant}


def _check_stacked(config: LoRAConfig, modules: Mapping[str, nn.Module], known: Mapping[str, None]) -> None:
    """Raise ``ValueError`` for a target that is a part of a layer which has one pair for all of its parts."""
    if not config.fused_pairs or isinstance(config.target_modules, str):
        return
    parts = {name: layer for name, (layer, _) in _units(modules, fused=False).items()}
    for pattern in config.target_modules:
        hit = [name for name in parts if hits([pattern], name)]
        if hit and not any(hits([pattern], name) for name in known):
            layer = parts[hit[0]].rpartition(".")[2]
            raise ValueError(
                f"{pattern!r} is a part of {layer!r}, which fused_pairs=True adapts as one: name {layer!r}"
            )


def select_parameters(model: nn.Module, config: LoRAConfig) -> Chosen:
    """Return the parameters that ``target_parameters`` means, each with the name of its module, by their full names.

    Raises:
        ValueError: an entry names no parameter, or one that is neither a matrix nor a stack of matrices.
    """
    wanted = config.target_parameters or []
    found: Chosen = {}
    hit: set[str] = set()
    for module_name, module in named_modules(model).items():
        for local in own_parameters(module):
            name = joined(module_name, local)
            entries = [entry for entry in wanted if name == entry or name.endswith(f".{entry}")]
            if entries and not hits(config.exclude_modules, module_name):
                matrices, *features = sizes_of_parameter(module, local)
                found[name] = (module_name, Part(name, local, (features[0], features[1]), matrices))
            hit.update(entries)
    for entry in wanted:
        if entry not in hit:
            names = [clean_name(name) for name, _ in model.named_parameters()]
            is_module = any(name == entry or name.endswith(f".{entry}") for name, _ in model.named_modules())
            hint = ": it is a module, for target_modules" if is_module else nearest_names([entry], names)
            raise ValueError(f"target_parameters entry {entry!r} matches no parameter of {type(model).__name__}{hint}")
    return found


def has_redundant_forward(module: nn.Module) -> bool:
    """Whether the instance's ``forward`` is the class's own after all, which accelerate leaves on unhooking."""
    return getattr(module.__dict__.get("forward"), "__func__", None) is type(module).forward


def _check_kind(name: str, module: nn.Module) -> None:
    mixin = mixin_for(module)
    if mixin is None:
        raise ValueError(
            f"{name!r} is a {type(module).__name__}, which cannot be adapted: linear layers, embeddings, convolutions "
            "and attentions can. To train it whole, name it in modules_to_save; to leave it, narrow target_modules or "
            "use exclude_modules. Other kinds: lightning_lora.layers.register"
        )
    if "forward" in module.__dict__ and not has_redundant_forward(module):
        raise ValueError(
            f"{name!r} has a forward of its own on the instance (accelerate's hooks do this), which would bypass "
            "the adapter; remove it first: accelerate.hooks.remove_hook_from_module(model, recurse=True)"
        )
    try:
        mixin.check(module)
    except ValueError as error:
        raise ValueError(f"{name!r} cannot be adapted: {error}; leave it out with exclude_modules") from None


def choose_mixin(modules: Mapping[str, nn.Module], name: str, config: LoRAConfig) -> type[LoRALayer]:
    """Return the mixin for the layer called ``name``.

    Raises:
        ValueError: a layer of its kind, or in its place, cannot be adapted as ``config`` asks.
    """
    layer = modules[name]
    mixin = mixin_for(layer)
    assert mixin is not None
    mixin.check_use(modules, name, config)
    check_rescaled(modules, name)
    if (reader := reader_of(modules, name)) is not None:
        try:
            mixin = read_mixin(mixin, layer, reader)
        except ValueError as error:
            raise ValueError(f"{name!r} cannot be adapted: {error}") from None
    try:
        options = {"use_dora": config.use_dora, "lora_bias": config.lora_bias, "adalora": config.adalora is not None}
        mixin = with_options(mixin, layer, **options)
    except ValueError as error:
        option = next(name for name, is_given in options.items() if is_given)
        given, instead = (option, "leave it out") if option == "adalora" else (f"{option}=True", f"give {option}=False")
        raise ValueError(
            f"{name!r} cannot be adapted with {given}: {error}. Leave the layer out with exclude_modules, or {instead}"
        ) from None
    starts_from_base = config.starts_from_base and mixin.uses_init
    return _starting_from_base(mixin, name, layer, config) if starts_from_base else mixin


def _starting_from_base(mixin: type[LoRALayer], name: str, layer: nn.Module, config: LoRAConfig) -> type[LoRALayer]:
    """Return the counterpart of ``mixin`` that subtracts its start in the product, after checking the weight."""
    residual = RESIDUAL.get(mixin)
    try:
        if residual is None or (layer._parameters.get("weight") is None and stored_form(layer) is None):
            raise ValueError(type(layer).__name__)
        weight = dense_weight(layer)
    except ValueError as error:
        raise ValueError(
            f"init={config.init!r} starts from the weights of linear layers, and {name!r} has none to start from "
            f"({error}): load the base first, or leave the layer out with exclude_modules"
        ) from None
    if not torch.isfinite(weight).all():
        raise ValueError(
            f"init={config.init!r} starts from the weight of {name!r}, which holds NaN or infinity: load another base, "
            "or take init='kaiming'"
        )
    return residual
