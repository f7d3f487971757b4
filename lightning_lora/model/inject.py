"""Freeze a model, put adapters into it, take them out again."""

import dataclasses
from collections.abc import Mapping
from itertools import groupby

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_info
from torch import nn

from lightning_lora.compat.torch import remove_load_hook
from lightning_lora.config import LoRAConfig
from lightning_lora.fuse import fuse, release
from lightning_lora.layers import LoRALayer, unadapt
from lightning_lora.layers.read_weight import reader_of
from lightning_lora.layers.token_rows import train_rows
from lightning_lora.layers.trained import keep_wide, restore_dtypes
from lightning_lora.model.init import initialize
from lightning_lora.model.layer_plan import LayerPlan, Plan
from lightning_lora.model.names import clean_name, named_modules
from lightning_lora.model.plan import plan
from lightning_lora.model.side_effects import (
    complete_state_dict,
    freeze_statistics,
    keep_off_fused_paths,
    trained_with_originals,
    unchanged_on_error,
    unfreeze_statistics,
)
from lightning_lora.model.spread import reshard, stop_gathering
from lightning_lora.model.state import (
    Injection,
    check_not_disabled,
    injection_of,
    is_merged,
    named_lora_layers,
    require_injection,
    require_roots,
)
from lightning_lora.model.targets import has_redundant_forward
from lightning_lora.model.wrapping import run_at_injection
from lightning_lora.ops.sharded import write


def inject(model: nn.Module, config: LoRAConfig | None = None) -> nn.Module:
    """Freeze ``model`` and adapt its layers in place, as ``config`` says. Returns the same object.

    A model that was adapted with an equal config is left as it is: nothing is frozen or drawn anew. Everything is
    decided and checked by :func:`~lightning_lora.plan` before anything is changed.

    Raises:
        ValueError: the config hits nothing or the wrong kind of module, a rank exceeds a layer, or the model is already
            adapted otherwise (here or by PEFT). The message names the module and the remedy.
    """
    existing = injection_of(model)
    if existing is not None and isinstance(config, LoRAConfig | None):
        _check_same_config(existing.config, config or LoRAConfig())
        return model
    decided = plan(model, config)
    _carry_out(decided)
    if decided.capped_ranks:
        rank_zero_info(f"LoRA: {decided.capped_ranks}")
    return model


def inject_anew(model: nn.Module, config: LoRAConfig, *, check_ranks: bool) -> nn.Module:
    """Adapt a model that holds no adapters; ``check_ranks=False`` takes ranks above a layer's size."""
    _carry_out(plan(model, config, check_ranks=check_ranks))
    return model


def apply(decided: Plan) -> nn.Module:
    """Freeze and adapt the model of a plan in place. Returns the model.

    If memory runs out or the user interrupts, the model is given back as it was.

    Raises:
        ValueError: the model was adapted, or its modules were changed, since it was planned.
    """
    model = decided.model
    if model is None or injection_of(model) is not None:
        raise ValueError(f"{decided.model_name} was adapted since it was planned: call remove on it, and plan anew")
    if plan(model, decided.config, check_ranks=False) != decided:
        raise ValueError(f"modules of {decided.model_name} were changed since it was planned: plan anew")
    _carry_out(decided)
    return model


def _carry_out(decided: Plan) -> None:
    config, model = decided.config, decided.model
    assert model is not None
    injection = Injection(dataclasses.replace(decided, model=None))
    dtype = None if config.adapter_dtype == "auto" else getattr(torch, config.adapter_dtype)
    modules = named_modules(model)
    with unchanged_on_error(model):
        for name, parameter in model.named_parameters():
            injection.requires_grad[clean_name(name)] = parameter.requires_grad
            parameter.requires_grad = False
        _train_whole(model, injection, dtype)
        by_layer = {layer: list(pairs) for layer, pairs in groupby(decided, lambda pair: pair.layer)}
        adapted = {layer: adapt_layer(modules, layer, pairs, dtype) for layer, pairs in by_layer.items()}
        initialize(adapted, by_layer, config)
        tag_parts(decided, model)
        if config.fuse:
            fuse(model)
        _train_rows(decided, modules, dtype)
        freeze_statistics(model, decided.trained_whole)
        keep_off_fused_paths(model, injection)
        model.register_load_state_dict_pre_hook(complete_state_dict)
        model.lora_injection = injection  # type: ignore[assignment]  # a plain attribute
        run_at_injection()


def adapt_layer(
    modules: Mapping[str, nn.Module], layer: str, pairs: list[LayerPlan], dtype: torch.dtype | None
) -> LoRALayer:
    """Turn the layer called ``layer`` into an adapted one, whose pairs hold zeros."""
    if has_redundant_forward(modules[layer]):
        del modules[layer].__dict__["forward"]
    own = {pair.part: (pair.r, pair.scaling) for pair in pairs}
    return pairs[0].mixin.adapt_parts(modules, layer, own, dropout=pairs[0].dropout, dtype=dtype)


def tag_parts(decided: Plan, model: nn.Module) -> None:
    """Let the kinds of layers keep what this rank holds of the adapters, where the base is split over ranks."""
    for mixin in dict.fromkeys(one.mixin for one in decided):
        mixin.tag_parts(model)


def _train_rows(decided: Plan, modules: Mapping[str, nn.Module], dtype: torch.dtype | None) -> None:
    """Let single rows of embeddings and output heads train."""
    for rows in decided.token_rows:
        names = [rows.name, *rows.tied]
        read = {modules[name] for name in names if reader_of(modules, name) is not None}
        train_rows(modules[rows.name], [modules[n] for n in rows.tied], rows.token_ids, dtype=dtype, read=read)


def remove(model: nn.Module) -> nn.Module:
    """Take the adapters out and give the model back as it was before :func:`inject`. Returns the same object.

    Heads and biases that trained get their first values back too, and every ``requires_grad`` its former one.

    Raises:
        ValueError: the model holds no adapters, or they are merged.
    """
    for root in require_roots(model).values():
        if is_merged(root):
            raise ValueError(
                "the adapters are merged into the base weights: call merge(model, remove=True) to keep the merged "
                "weights without adapters, or unmerge(model) first to get the base back"
            )
        check_not_disabled(root)
        reshard(root)
        for parameter, original in trained_with_originals(root):
            write(parameter, original)
        take_out(root)
    return model


def take_out(root: nn.Module) -> None:
    """Undo an injection, but for the values of the base tensors."""
    injection = require_injection(root)
    adapters = {id(p) for layer in named_lora_layers(root).values() for _, p in layer.named_adapter_tensors()}
    for layer in list(root.modules()):
        if isinstance(layer, LoRALayer):
            unadapt(layer)
        else:
            release(layer)
    stop_gathering(root, adapters)
    unfreeze_statistics(root)
    for name, parameter in root.named_parameters():
        # a parameter that was put in since keeps its flag
        parameter.requires_grad_(injection.requires_grad.get(clean_name(name), parameter.requires_grad))
    restore_dtypes(root)
    for module, name, former in injection.undo:
        setattr(module, name, former)
    remove_load_hook(root, complete_state_dict)
    del root.lora_injection


def _train_whole(model: nn.Module, injection: Injection, dtype: torch.dtype | None) -> None:
    """Unfreeze heads and biases in ``dtype`` at least, and keep copies for ``disabled`` and ``remove``."""
    trained = {name: p for n, p in model.named_parameters() if (name := clean_name(n)) in injection.plan.trained}
    for name, parameter in trained.items():
        parameter.requires_grad_(True)
        if parameter.device.type != "meta":
            injection.originals[name] = parameter.detach().clone()
    keep_wide(model, trained.values(), dtype)


def _check_same_config(existing: LoRAConfig, config: LoRAConfig) -> None:
    if existing == config:
        return
    given, there = config.to_dict(), existing.to_dict()
    changed = ", ".join(f"{key}={given[key]!r} (there: {there[key]!r})" for key in given if given[key] != there[key])
    raise ValueError(f"the model is already adapted with another config: {changed}. Call remove(model) first")
