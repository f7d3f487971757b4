"""Quantise a frozen base in place, before adapters are put in: linear layers and experts hold 4 or 8 bits a weight."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from lightning_lora.compat.torch import compiled_module, remove_load_hook
from lightning_lora.config import Quantization, answering_other_names
from lightning_lora.fuse.experts import quantize_experts
from lightning_lora.layers import LoRALayer
from lightning_lora.layers.quantized import QuantizedModule, quantize_parameters
from lightning_lora.layers.quantized_linear import packing_mixin
from lightning_lora.layers.quantized_model import check_state
from lightning_lora.layers.read_weight import reader_of
from lightning_lora.model.base_form import (
    QuantizationPlan,
    check_form,
    check_kind,
    check_not_foreign,
    plain_exclusion,
    quantization_of,
)
from lightning_lora.model.families import families_in, output_head
from lightning_lora.model.matching import check_hits
from lightning_lora.model.names import clean_name, is_inside, listed
from lightning_lora.model.stacks import find_stacks, is_excluded, known_experts
from lightning_lora.model.trained_base import new_heads
from lightning_lora.model.wrapping import run_at_injection
from lightning_lora.ops.packed import FORMS

ROUTERS = ("gate", "router", "shared_expert_gate")  # linear layers beside a module called "experts"


@answering_other_names
def quantize(model: nn.Module, kind: Quantization, *, exclude: str | Sequence[str] | None = None) -> nn.Module:
    """Quantise the linear layers of ``model`` in place: each holds packed bytes that are made dense when it is used.

    So do the matrices of fused experts, which are 3-D parameters of a module, where the module computes what
    transformers' experts do. Left as they are: other 3-D parameters, the output head, new task heads, routers of
    experts, weights that two modules share, layers whose weight another module reads, and what ``exclude`` names. Codes
    and bytes are those of bitsandbytes, which need not be installed; :meth:`torch.nn.Module.state_dict` has its keys,
    and ``load_state_dict`` takes them and floating-point weights. Returns the same object. A model that has this form
    is left alone. :func:`~lightning_lora.plan` says what would be packed, and what not.

    Args:
        kind: ``"nf4"``, 4-bit NormalFloat in blocks of 64 (Dettmers et al. 2023, arXiv 2305.14314), 4.5 bits a weight;
            ``"nf4-dq"``, with double quantisation, 4.13 bits; ``"int8"``, integers with a scale for each row.
        exclude: names of modules to leave out, by the rules of ``target_modules``.

    Raises:
        ValueError: the model is quantised in another form, or adapted, ``exclude`` hits nothing, there is nothing to
            quantise, or a weight holds NaN or infinity. Nothing is changed then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a module, got {type(model).__name__}: write quantize(model, 'nf4')")
    if (former := quantization_of(model)) is not None:
        check_form(former, kind, exclude)
    else:
        apply_quantization(model, plan_quantization(model, kind, exclude=exclude))
    return model


def quantize_once(
    model: nn.Module,
    quantize: Quantization | None = None,
    quantize_exclude: str | Sequence[str] | None = None,
) -> None:
    """Quantise a base if that is asked for and was not done, before adapters with names are added.

    Raises:
        ValueError: it is quantised otherwise, or has adapters already.
    """
    if quantize is not None and (former := quantization_of(model)) is not None:
        check_form(former, quantize, quantize_exclude)
    elif quantize is not None:
        apply_quantization(model, plan_quantization(model, quantize, exclude=quantize_exclude))


def apply_quantization(model: nn.Module, decided: QuantizationPlan) -> None:
    """Quantise the layers of a plan in place, one after another; a model that the plan was applied to stays as it is.

    Raises:
        ValueError: a weight holds NaN or infinity. Nothing is changed then.
    """
    if quantization_of(model) is not None:
        return
    model = compiled_module(model) or model
    modules = _modules(model)
    weights = {name: f"{name}.weight" for name in decided.layers} | {name: name for name in decided.stacks}
    bad = [name for name, weight in weights.items() if not _is_finite(_parameter(modules, weight))]
    if bad:
        holds = "holds" if len(bad) == 1 else "hold"
        raise ValueError(f"{listed(bad)} {holds} NaN or infinity, which cannot be quantised: load a base without them")
    with ExitStack() as around:
        for family in families_in(model):
            around.enter_context(family.quantizing(model))
        for name in decided.layers:
            mixin = packing_mixin(modules[name])
            assert mixin is not None
            quantize_parameters(modules[name], {"weight": decided.kind}, mixin)
    for name in dict.fromkeys(stack.rpartition(".")[0] for stack in decided.stacks):
        known = known_experts(modules[name])
        assert known is not None
        quantize_experts(modules[name], known, decided.kind)
    run_at_injection()
    model.register_load_state_dict_pre_hook(check_state)
    model.lora_quantization = decided  # type: ignore[assignment]  # a plain attribute


def check_packed_last(model: nn.Module) -> None:
    """Let ``load_state_dict`` of a quantised model check packed weights after its other hooks have filled some in."""
    if quantization_of(model) is not None:
        remove_load_hook(model, check_state)
        model.register_load_state_dict_pre_hook(check_state)


def plan_quantization(
    model: nn.Module,
    kind: Quantization,
    *,
    exclude: str | Sequence[str] | None = None,
    keep: Mapping[str, str] | None = None,
) -> QuantizationPlan:
    """Decide and check what :func:`quantize` would pack, and change nothing. The model may be on the meta device.

    Args:
        keep: modules that stay as they are, each with the reason.
    """
    check_kind(kind)
    exclude = plain_exclusion(exclude)
    modules = _modules(model)
    check_not_foreign(modules)
    for name, module in modules.items():
        if isinstance(module, QuantizedModule):
            raise ValueError(f"{name!r} is quantised: quantise a base once, from its floating-point weights")
        if isinstance(module, LoRALayer):
            raise ValueError(f"{name!r} is adapted: quantise the base before adapters are put in")
    check_hits("quantize_exclude", exclude, modules, type(model).__name__)
    linear = {n: m for n, m in modules.items() if isinstance(m, nn.Linear) or packing_mixin(m) is not None}
    left_out = _left_out(model, modules, linear, exclude, keep or {})
    layers = tuple(name for name in linear if name not in left_out)
    for family in families_in(model):
        family.check_quantization(kind, {name: modules[name] for name in layers})
    stacks = find_stacks(modules, FORMS[kind], exclude, keep or {})
    left_out |= stacks.left_out
    if not layers and not stacks.packed:
        raise ValueError(
            f"{type(model).__name__} has no linear layer to quantise" + (f": {left_out}" if left_out else "")
        )
    weights = [_parameter(modules, name) for name in (*(f"{layer}.weight" for layer in layers), *stacks.packed)]
    mixins = [packing_mixin(modules[name]) for name in layers] + [None] * len(stacks.packed)
    is_turned = [mixin is not None and mixin.packs_transpose for mixin in mixins]
    shapes = [w.shape[::-1] if turned else w.shape for w, turned in zip(weights, is_turned, strict=True)]
    sizes = [FORMS[kind].sizes(shape) for shape in shapes]
    return QuantizationPlan(
        kind,
        exclude,
        layers,
        stacks.packed,
        left_out,
        bytes_before=sum(weight.numel() * weight.element_size() for weight in weights),
        bytes_after=sum(torch.Size(shape).numel() for parts in sizes for shape in parts.values()),
    )


def _left_out(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    linear: Iterable[str],
    exclude: str | Sequence[str] | None,
    keep: Mapping[str, str],
) -> dict[str, str]:
    """Return the linear layers that are left as they are, each with the reason."""
    kept = dict.fromkeys(new_heads(model), "new task head") | dict(keep)
    heads = {id(head) for module in (model, *modules.values()) if (head := output_head(module)) is not None}
    left_out = {}
    for name in linear:
        within = next((why for path, why in kept.items() if is_inside(name, path)), None)
        if is_excluded(exclude, name):
            left_out[name] = "excluded"
        elif id(modules[name]) in heads:
            left_out[name] = "output head"
        elif (why := within or _reason(modules, name)) is not None:
            left_out[name] = why
    return left_out


def _reason(modules: Mapping[str, nn.Module], name: str) -> str | None:
    """Return why a linear layer cannot be packed for what it is and where, or ``None``."""
    layer, (parent, _, local) = modules[name], name.rpartition(".")
    weight = layer._parameters.get("weight")
    if local in ROUTERS and f"{parent}.experts".lstrip(".") in modules:
        return "router"
    if packing_mixin(layer) is None or weight is None:
        return "has a forward of its own"
    if sum(weight is other for module in modules.values() for other in module._parameters.values()) > 1:
        return "shares its weight"
    if isinstance(modules.get(parent), nn.MultiheadAttention) or reader_of(modules, name) is not None:
        return "another module reads its weight"
    return None


def _parameter(modules: Mapping[str, nn.Module], name: str) -> nn.Parameter:
    path, _, local = name.rpartition(".")
    return modules[path].get_parameter(local)


def _is_finite(weight: Tensor) -> bool:
    return weight.device.type == "meta" or bool(torch.isfinite(weight).all())


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    return {clean_name(name): module for name, module in model.named_modules()}
