"""Freeze a model, put adapters into it, take them out again."""

import sys
from collections.abc import Iterator
from typing import Any

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn

from lightning_lora.config import LoRAConfig
from lightning_lora.fuse.fusing import fuse, release
from lightning_lora.layers import LoRALayer, adapt, unadapt
from lightning_lora.layers.dora import DoRA
from lightning_lora.layers.parameters import adapt_parameters
from lightning_lora.layers.read_weight import reader_of
from lightning_lora.layers.token_rows import train_rows
from lightning_lora.layers.trained import give_back, keep_wide
from lightning_lora.megatron.layers import adapt_megatron
from lightning_lora.megatron.names import by_layer, stacks
from lightning_lora.megatron.parallel_layers import TensorParallel
from lightning_lora.megatron.split import keep_parts
from lightning_lora.model import recomputation, save_pretrained  # noqa: F401  # wrap functions when a model is adapted
from lightning_lora.model.gathered import forget, reshard
from lightning_lora.model.init import initialize
from lightning_lora.model.names import clean_name, joined
from lightning_lora.model.plan import Plan, planned
from lightning_lora.model.state import (
    Injection,
    capped_ranks,
    check_not_disabled,
    injection_of,
    is_merged,
    named_trained_whole,
    require_injection,
    require_roots,
    uncompiled,
)
from lightning_lora.model.statistics import freeze_statistics, unfreeze_statistics
from lightning_lora.model.undo import unchanged_on_error
from lightning_lora.model.wrapping import run_at_injection
from lightning_lora.ops.linear import row_norms
from lightning_lora.ops.sharded import write


def inject(model: nn.Module, config: LoRAConfig | None = None) -> nn.Module:
    """Freeze ``model`` and adapt its layers in place, as ``config`` says. Returns the same object.

    A model that was adapted with an equal config is left as it is: nothing is frozen or drawn anew. Everything is
    checked before anything is changed.

    Raises:
        ValueError: the config hits nothing or the wrong kind of module, a rank exceeds a layer, or the model is already
            adapted otherwise (here or by PEFT). The message names the module and the remedy.
    """
    config = LoRAConfig() if config is None else config
    if not isinstance(config, LoRAConfig):
        hint = ": write LoRAConfig.from_peft(config)" if hasattr(config, "peft_type") else ""
        raise TypeError(f"config must be a LoRAConfig, got {type(config).__name__}{hint}")
    existing = injection_of(model)
    if existing is not None:
        _check_same_config(existing.config, config)
        return model
    inject_anew(model, config, check_ranks=True)
    if capped := capped_ranks(model):
        rank_zero_info(f"LoRA: {capped}")
    return model


def inject_anew(model: nn.Module, config: LoRAConfig, *, check_ranks: bool) -> nn.Module:
    """Adapt a model that holds no adapters; ``check_ranks=False`` takes ranks above a layer's size."""
    given, model = model, uncompiled(model)
    _check_untouched(model)
    plan = planned(model, config, check_ranks=check_ranks)
    with unchanged_on_error(model):
        _carry_out(plan, model, config)
    return given


def _carry_out(plan: Plan, model: nn.Module, config: LoRAConfig) -> None:
    """Freeze and adapt the model as planned."""
    injection = Injection(config, plan.trained_whole, capped=plan.capped)
    for name, parameter in model.named_parameters():
        injection.requires_grad[clean_name(name)] = parameter.requires_grad
        parameter.requires_grad = False
    dtype = None if config.adapter_dtype == "auto" else getattr(torch, config.adapter_dtype)
    _train_whole(model, plan, injection, dtype)
    initialize(_adapt(plan, model, config, dtype), config)
    keep_parts(model)
    fuse(model)
    read = {module for name, module in plan.modules.items() if plan.rows and reader_of(plan.modules, name) is not None}
    for embedding, heads, token_ids in plan.rows.values():
        train_rows(embedding, heads, token_ids, dtype=dtype, read=read)
    freeze_statistics(model, plan.trained_whole)
    _keep_off_fused_paths(model, injection)
    model.register_load_state_dict_pre_hook(_complete_state_dict)
    model.lora_injection = injection  # type: ignore[assignment]  # a plain attribute
    run_at_injection()


def _adapt(plan: Plan, model: nn.Module, config: LoRAConfig, dtype: torch.dtype | None) -> dict[str, LoRALayer]:
    """Turn the layers of the plan, and the modules of its parameters, into adapted ones, whose pairs hold zeros."""
    how_stacked = stacks(model)
    adapted: dict[str, LoRALayer] = {}
    for name, wanted in by_layer(plan.parts, plan.layers).items():
        adapted[name] = adapt_megatron(
            plan.modules[name],
            {part.part: (plan.ranks[part.name], plan.scales[part.name]) for part in wanted},
            how_stacked[name],
            {part.part: part.name for part in wanted},
            dropout=config.dropout,
            dtype=dtype,
        )
    for name, layer in plan.layers.items():
        if name in plan.parts:
            continue
        layer.__dict__.pop("forward", None)  # what accelerate leaves on unhooking: the class's own, see matching
        adapted[name] = adapt(
            layer,
            plan.mixins[name],
            r=plan.ranks[name],
            scaling=plan.scales[name],
            dropout=config.dropout,
            dtype=dtype,
        )
    for name, locals_ in plan.parameters.items():
        own = {local: (plan.ranks[joined(name, local)], plan.scales[joined(name, local)]) for local in locals_}
        adapted[name] = adapt_parameters(plan.modules[name], own, dtype=dtype)
    return adapted


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
        for parameter, original in _with_originals(root):
            write(parameter, original)
        take_out(root)
    return model


def take_out(root: nn.Module) -> None:
    """Undo an injection, but for the values of the base tensors."""
    injection = require_injection(root)
    adapters = {id(p) for m in root.modules() if isinstance(m, LoRALayer) for _, p in m.named_adapter_tensors()}
    for layer in list(root.modules()):
        if isinstance(layer, LoRALayer):
            unadapt(layer)
        else:
            release(layer)
    forget(root, adapters)
    unfreeze_statistics(root)
    for name, parameter in root.named_parameters():
        # a parameter that was put in since keeps its flag
        parameter.requires_grad_(injection.requires_grad.get(clean_name(name), parameter.requires_grad))
    give_back(root)
    for module, name, former in injection.undo:
        setattr(module, name, former)
    for key, hook in list(root._load_state_dict_pre_hooks.items()):
        if getattr(hook, "hook", None) is _complete_state_dict:
            del root._load_state_dict_pre_hooks[key]
    del root.lora_injection


def _base_that_trains(model: nn.Module, plan: Plan, config: LoRAConfig) -> dict[str, nn.Parameter]:
    """Return the base parameters that train by design, by clean name; tied ones by their first."""
    wanted = {id(p) for name in plan.trained_whole if name in plan.modules for p in plan.modules[name].parameters()}
    if config.bias == "lora_only":
        tables = [module for table, tied, _ in plan.rows.values() for module in (table, *tied)]
        adapted = [*plan.layers.values(), *(plan.modules[name] for name in plan.parameters), *tables]
        wanted |= {id(bias) for layer in adapted if (bias := layer._parameters.get("bias")) is not None}
    return {
        clean_name(name): parameter
        for name, parameter in model.named_parameters()
        if id(parameter) in wanted
        or clean_name(name) in plan.trained_whole
        or (config.bias == "all" and clean_name(name).split(".")[-1] == "bias")
    }


def _train_whole(model: nn.Module, plan: Plan, injection: Injection, dtype: torch.dtype | None) -> None:
    """Unfreeze heads and biases in ``dtype`` at least, and keep copies for ``disabled`` and ``remove``."""
    trained = _base_that_trains(model, plan, injection.config)
    injection.trained = list(trained)
    for name, parameter in trained.items():
        parameter.requires_grad_(True)
        if parameter.device.type != "meta":
            injection.originals[name] = parameter.detach().clone()
    keep_wide(model, trained.values(), dtype)


def _with_originals(root: nn.Module) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Yield the base parameters that train, each with its first value."""
    injection = require_injection(root)
    for name, parameter in named_trained_whole(root).items():
        if name not in injection.originals:
            raise ValueError(
                f"the first value of {name!r} is unknown: it was on the meta device when the model was adapted, and no "
                "base checkpoint was loaded since by load_state_dict"
            )
        yield parameter, injection.originals[name]


def trained_with_originals(root: nn.Module) -> list[tuple[nn.Parameter, Tensor]]:
    """Return the base parameters that train by design, each with its first value."""
    return list(_with_originals(root))


def _check_same_config(existing: LoRAConfig, config: LoRAConfig) -> None:
    if existing == config:
        return
    given, there = config.to_dict(), existing.to_dict()
    changed = ", ".join(f"{key}={given[key]!r} (there: {there[key]!r})" for key in given if given[key] != there[key])
    raise ValueError(f"the model is already adapted with another config: {changed}. Call remove(model) first")


def _check_untouched(model: nn.Module) -> None:
    peft_layers = sys.modules.get("peft.tuners.tuners_utils")
    theirs = () if peft_layers is None else (peft_layers.BaseTuner, peft_layers.BaseTunerLayer)
    for name, module in model.named_modules():
        for local, parameter in module._parameters.items():
            if nn.parameter.is_lazy(parameter):
                lazy = f"{name}.{local}"
                raise ValueError(f"{lazy!r} has no size yet (a lazy module): run one batch through the model first")
        if isinstance(module, TensorParallel):
            raise ValueError(
                f"{name!r} was split over ranks by a former run under 'megatron_lora', and an adapter would be put in "
                "whole: build the model anew"
            )
        if isinstance(module, LoRALayer) or injection_of(module) is not None:
            raise ValueError(
                f"{name or type(model).__name__!r} is already adapted, as part of another model: call remove on "
                "it first"
            )
        if isinstance(module, theirs):
            raise ValueError(
                f"{type(model).__name__} is already wrapped by PEFT (at {name or 'the top'!r}): pass the base model, "
                "peft_model.unload(); adapters that PEFT saved are read by load_peft(model, directory)"
            )


def _keep_off_fused_paths(model: nn.Module, injection: Injection) -> None:
    """Keep ``nn.TransformerEncoderLayer`` from its fused path in eval, which reads weights past the adapters."""

    def change(module: nn.Module, name: str, value: Any) -> None:
        injection.undo.append((module, name, getattr(module, name)))
        setattr(module, name, value)

    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and any(isinstance(m, LoRALayer) for m in module.modules()):
            change(module, "activation_relu_or_gelu", 0)
        if isinstance(module, nn.TransformerEncoder) and any(isinstance(m, LoRALayer) for m in module.modules()):
            change(module, "use_nested_tensor", False)


def _complete_state_dict(root: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Let a base checkpoint load without adapters, and an adapter checkpoint without the base.

    The missing half is filled in with the tensors that are there, only when all of it is missing: one absent adapter
    among others stays an error.
    """
    injection = injection_of(root)
    if injection is None:
        return
    if is_merged(root):
        raise ValueError("the adapters are merged into the weights: call unmerge(model) before loading a state into it")
    own = {f"{prefix}{name}": tensor for name, tensor in root.state_dict(keep_vars=True).items()}
    adapters = {
        prefix + joined(name, local)
        for name, layer in root.named_modules(remove_duplicate=False)
        if isinstance(layer, LoRALayer)
        for local in layer.tensor_names
    }
    whole = named_trained_whole(root)
    trained = {f"{prefix}{name}" for name, _ in root.named_parameters() if clean_name(name) in whole}
    base = own.keys() - adapters - trained
    first: dict[int, str] = {}  # of the names of one tensor; a file has the others or not
    for key, tensor in own.items():
        first.setdefault(id(tensor), key)
    if not any(key in state_dict for key in adapters):
        state_dict.update({key: own[key] for key in adapters})
        _restart_magnitudes(root, state_dict, prefix)
        for name in whole:
            value = state_dict.get(f"{prefix}{name}")
            if isinstance(value, Tensor):
                injection.originals[name] = value.detach().clone()
    elif all(first[id(own[key])] in state_dict for key in adapters) and not any(key in state_dict for key in base):
        for key in (base | adapters) - state_dict.keys():
            state_dict[key] = state_dict.get(first[id(own[key])], own[key])


@torch.no_grad()
def _restart_magnitudes(root: nn.Module, state_dict: dict[str, Any], prefix: str) -> None:
    """Let magnitudes that have not trained start at the norms of the base that a state dict brings."""
    for name, layer in root.named_modules():
        weight = state_dict.get(f"{prefix}{joined(name, 'weight')}")
        if not isinstance(layer, DoRA) or not isinstance(weight, Tensor) or not layer.is_at_start():
            continue
        matrix = layer.as_matrix(weight.to(layer.base_weight))
        norms = row_norms(matrix, *layer.factors(), layer.lora_scaling)
        state_dict[f"{prefix}{joined(name, 'lora_magnitude')}"] = norms.view_as(layer.lora_magnitude)
