"""Carry out a plan: quantise and freeze the base, put adapters in, and let the rest train that should."""

from collections.abc import Mapping
from itertools import groupby
from typing import Any

import torch
from torch import nn

from lightning_lora.config import LoRAConfig
from lightning_lora.fuse import fuse
from lightning_lora.layers import LoRALayer
from lightning_lora.layers.read_weight import reader_of
from lightning_lora.layers.token_rows import train_rows
from lightning_lora.layers.trained import keep_wide
from lightning_lora.model.base_form import quantization_of
from lightning_lora.model.init import initialize
from lightning_lora.model.layer_plan import LayerPlan, Plan
from lightning_lora.model.names import clean_name, named_modules
from lightning_lora.model.plan import plan
from lightning_lora.model.quantize import apply_quantization, check_packed_last
from lightning_lora.model.side_effects import (
    complete_state_dict,
    freeze_statistics,
    keep_off_fused_paths,
    unchanged_on_error,
)
from lightning_lora.model.state import Injection, injection_of
from lightning_lora.model.targets import has_redundant_forward
from lightning_lora.model.wrapping import run_at_injection


def apply(decided: Plan) -> nn.Module:
    """Freeze and adapt the model of a plan in place. Returns the model.

    If memory runs out or the user interrupts, the model is given back as it was; a base that is quantised stays so.

    Raises:
        ValueError: the model was adapted, or its modules were changed, since it was planned.
    """
    model, base = decided.model, decided.quantization
    if model is None or injection_of(model) is not None:
        raise ValueError(f"{decided.model_name} was adapted since it was planned: call remove on it, and plan anew")
    quantization: dict[str, Any] = {} if base is None else {"quantize": base.kind, "quantize_exclude": base.exclude}
    if plan(model, decided.config, check_ranks=False, **quantization) != decided:
        raise ValueError(f"modules of {decided.model_name} were changed since it was planned: plan anew")
    carry_out(decided)
    return model


def carry_out(decided: Plan) -> None:
    """Apply a plan that was just made of its model."""
    config, model = decided.config, decided.model
    assert model is not None
    if decided.quantization is not None and quantization_of(model) is None:
        apply_quantization(model, decided.quantization)
        decided = plan(model, config, check_ranks=False)  # of the layers that the base has since
    injection = Injection(decided.without_model())
    dtype = dtype_of(config)
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
        check_packed_last(model)
        model.lora_injection = injection  # type: ignore[assignment]  # a plain attribute
        run_at_injection()


def dtype_of(config: LoRAConfig) -> torch.dtype | None:
    """Return the narrowest dtype that adapters may have; ``None`` where they follow the base."""
    return None if config.adapter_dtype == "auto" else getattr(torch, config.adapter_dtype)


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


def _train_whole(model: nn.Module, injection: Injection, dtype: torch.dtype | None) -> None:
    """Unfreeze heads and biases in ``dtype`` at least, and keep copies for ``disabled`` and ``remove``."""
    trained = {name: p for n, p in model.named_parameters() if (name := clean_name(n)) in injection.plan.trained}
    for name, parameter in trained.items():
        parameter.requires_grad_(True)
        if parameter.device.type != "meta":
            injection.originals[name] = parameter.detach().clone()
    keep_wide(model, trained.values(), dtype)
