"""Adapt a model, and take its adapters out again."""

from collections.abc import Sequence
from typing import Any, TypeVar

from lightning.fabric.utilities.rank_zero import rank_zero_info
from torch import nn

from lightning_lora.compat.torch import remove_load_hook
from lightning_lora.config import LoRAConfig, Quantization, answering_other_names
from lightning_lora.fuse import release
from lightning_lora.layers import LoRALayer, unadapt
from lightning_lora.layers.acting import Undecided
from lightning_lora.layers.host import release_host
from lightning_lora.layers.trained import restore_dtypes
from lightning_lora.model.apply import carry_out
from lightning_lora.model.base_form import check_form
from lightning_lora.model.hosts import drop_adapter, fuse_anew, named_hosts
from lightning_lora.model.merged_model import form_before_merge
from lightning_lora.model.names import clean_name
from lightning_lora.model.plan import plan
from lightning_lora.model.side_effects import complete_state_dict, trained_with_originals, unfreeze_statistics
from lightning_lora.model.spread import reshard, stop_gathering
from lightning_lora.model.state import (
    check_not_disabled,
    injection_of,
    is_merged,
    named_lora_layers,
    require_injection,
    require_roots,
)
from lightning_lora.ops.sharded import write

T = TypeVar("T")


@answering_other_names
def inject(
    model: nn.Module,
    config: LoRAConfig | None = None,
    *,
    quantize: Quantization | None = None,
    quantize_exclude: str | Sequence[str] | None = None,
) -> nn.Module:
    """Freeze ``model`` and adapt its layers in place, as ``config`` says. Returns the same object.

    A model that was adapted with an equal config is left as it is: nothing is frozen or drawn anew. Everything is
    decided and checked by :func:`~lightning_lora.plan` before anything is changed.

    Args:
        quantize: quantise the base first, as :func:`~lightning_lora.quantize` does: ``"nf4"``, ``"nf4-dq"`` or
            ``"int8"``. What trains whole stays as it is. A base that has this form already is left alone.
        quantize_exclude: modules of the base that are not quantised, by the rules of ``target_modules``.

    Raises:
        ValueError: the config hits nothing or the wrong kind of module, a rank exceeds a layer, the model is already
            adapted otherwise (here or by PEFT), or its base is quantised otherwise. The message names the module and
            the remedy.
    """
    existing = injection_of(model)
    if existing is not None and existing.named:
        raise ValueError(
            f"the model has adapters with names, {', '.join(existing.named)}: add one with add_adapter(model, name, "
            "config), or call remove(model) first"
        )
    if existing is not None and isinstance(config, LoRAConfig | None):
        _check_same_config(existing.config, config or LoRAConfig())
        if quantize is not None:
            check_form(form_before_merge(model), quantize, quantize_exclude)
        return model
    decided = plan(model, config, quantize=quantize, quantize_exclude=quantize_exclude)
    carry_out(decided)
    if decided.capped_ranks:
        rank_zero_info(f"LoRA: {decided.capped_ranks}")
    return model


def inject_anew(model: nn.Module, config: LoRAConfig, *, check_ranks: bool, **quantization: Any) -> nn.Module:
    """Adapt a model that holds no adapters; ``check_ranks=False`` takes ranks above a layer's size.

    Args:
        quantization: ``quantize`` and ``quantize_exclude``.
    """
    carry_out(plan(model, config, check_ranks=check_ranks, **quantization))
    return model


def remove(model: nn.Module, adapter: str | None = None) -> nn.Module:
    """Take the adapters out and give the model back as it was before :func:`inject`. Returns the same object.

    Heads and biases that trained get their first values back too, and every ``requires_grad`` its former one. A base
    that was quantised stays quantised.

    Args:
        adapter: the name of one adapter to take out; the others stay.

    Raises:
        ValueError: the model holds no adapters, or none of this name, or they are merged or active.
    """
    for root in require_roots(model).values():
        if is_merged(root):
            raise ValueError(
                "the adapters are merged into the base weights: call merge(model, remove=True) to keep the merged "
                "weights without adapters, or unmerge(model) first to get the base back"
            )
        check_not_disabled(root)
        if adapter is not None and take_out_named(root, adapter):
            continue
        reshard(root)
        for parameter, original in trained_with_originals(root):
            write(parameter, original)
        take_out(root)
    return model


def take_out_named(root: nn.Module, name: str) -> bool:
    """Take the adapter called ``name`` out, unless it is the last one. Returns whether others stay."""
    injection = require_injection(root)
    if name not in injection.named:
        known = ", ".join(map(repr, injection.named)) or "one without a name"
        raise ValueError(f"there is no adapter {name!r}: {type(root).__name__} has {known}")
    if not isinstance(injection.choice.chosen, Undecided):
        raise ValueError(f"adapter {name!r} cannot be removed inside active(model, ...): leave that block first")
    if len(injection.named) == 1:
        return False
    for host in named_hosts(root).values():
        drop_adapter(host, name)
    if injection.named.pop(name).plan.config.fuse:
        fuse_anew(root)
    del injection.choice.seeds[name]
    injection.trained_over.pop(name, None)
    return True


def take_out(root: nn.Module) -> None:
    """Undo an injection, but for the values of the base tensors."""
    injection = require_injection(root)
    adapters = {id(p) for layer in named_lora_layers(root).values() for _, p in layer.named_adapter_tensors()}
    for host in named_hosts(root).values():
        release_host(host)
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


def _check_same_config(existing: LoRAConfig, config: LoRAConfig) -> None:
    if existing == config:
        return
    given, there = config.to_dict(), existing.to_dict()
    changed = ", ".join(f"{key}={given[key]!r} (there: {there[key]!r})" for key in given if given[key] != there[key])
    raise ValueError(f"the model is already adapted with another config: {changed}. Call remove(model) first")
