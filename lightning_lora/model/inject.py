"""Adapt a model, and take its adapters out again."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from lightning.fabric.utilities.rank_zero import rank_zero_info
from torch import nn

from lightning_lora.compat.torch import remove_load_hook
from lightning_lora.config import LoRAConfig, Quantization, answering_other_names
from lightning_lora.fuse import release
from lightning_lora.layers import LoRALayer, unadapt
from lightning_lora.layers.trained import restore_dtypes
from lightning_lora.model.apply import carry_out
from lightning_lora.model.base_form import check_form, quantization_of
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


def inject_checked(model: nn.Module, config: LoRAConfig, check: Callable[[bool], T], **quantization: Any) -> T:
    """Adapt a model that holds no adapters, and return what ``check`` returns; if it raises, nothing is changed.

    A base that is to be quantised is checked before that, too: its values would not come back.

    Args:
        check: raises ``ValueError`` if the adapted model is not the right one. Its argument says whether the base has
            the form that it will keep.
        quantization: ``quantize`` and ``quantize_exclude``.
    """
    forms = [quantization]
    if quantization.get("quantize") is not None and quantization_of(model) is None:
        plan(model, config, check_ranks=False, **quantization)
        forms = [{}, quantization]
    for form in forms:
        inject_anew(model, config, check_ranks=False, **form)
        try:
            checked = check(form is quantization)
        except ValueError:
            remove(model)
            raise
        if form is not quantization:
            remove(model)
    return checked


def remove(model: nn.Module) -> nn.Module:
    """Take the adapters out and give the model back as it was before :func:`inject`. Returns the same object.

    Heads and biases that trained get their first values back too, and every ``requires_grad`` its former one. A base
    that was quantised stays quantised.

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


def _check_same_config(existing: LoRAConfig, config: LoRAConfig) -> None:
    if existing == config:
        return
    given, there = config.to_dict(), existing.to_dict()
    changed = ", ".join(f"{key}={given[key]!r} (there: {there[key]!r})" for key in given if given[key] != there[key])
    raise ValueError(f"the model is already adapted with another config: {changed}. Call remove(model) first")
