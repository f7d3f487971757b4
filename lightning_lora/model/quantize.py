"""Quantise a frozen base in place: its linear layers hold 4 or 8 bits a weight, before adapters are put in."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

import torch
from torch import nn

from lightning_lora.compat.torch import compiled_module
from lightning_lora.config import Quantization
from lightning_lora.layers import LoRALayer
from lightning_lora.layers.quantized import QuantizedLinear, QuantizedModule, check_state, quantize_parameters
from lightning_lora.layers.read_weight import reader_of
from lightning_lora.layers.same_code import is_plain_linear
from lightning_lora.model.families import output_head
from lightning_lora.model.matching import check_hits, hits
from lightning_lora.model.names import clean_name, is_inside, listed
from lightning_lora.model.trained_base import new_heads
from lightning_lora.model.wrapping import run_at_injection
from lightning_lora.ops.packed import FORMS
from lightning_lora.ops.quantized import stored_as

ROUTERS = ("gate", "router", "shared_expert_gate")  # linear layers beside a module called "experts"


@dataclass(frozen=True)
class QuantizationPlan:
    """What :func:`quantize` will pack.

    Attributes:
        kind: ``"nf4"``, ``"nf4-dq"`` or ``"int8"``.
        exclude: what was asked to be left out.
        layers: names of the layers, in the order of the model.
        left_out: linear layers that stay as they are, each with the reason.
        bytes_before: of the layers' weights.
        bytes_after: of their packed parts.
    """

    kind: Quantization
    exclude: str | tuple[str, ...] | None
    layers: tuple[str, ...]
    left_out: Mapping[str, str] = field(hash=False)
    bytes_before: int
    bytes_after: int

    def __str__(self) -> str:
        stay = "".join(
            f"; as before: {listed([name for name, why in self.left_out.items() if why == reason])} ({reason})"
            for reason in dict.fromkeys(self.left_out.values())
        )
        return (
            f"{self.kind}: {len(self.layers)} linear layers, {self.bytes_before / 1e6:,.1f} -> "
            f"{self.bytes_after / 1e6:,.1f} MB{stay}"
        )


def quantize(model: nn.Module, kind: Quantization, *, exclude: str | Sequence[str] | None = None) -> QuantizationPlan:
    """Quantise the linear layers of ``model`` in place: each holds packed bytes that are made dense when it is used.

    Left as they are: the output head, new task heads, routers of experts, weights that two modules share, layers whose
    weight another module reads, and what ``exclude`` names. Codes and bytes are those of bitsandbytes, which need not
    be installed; :meth:`torch.nn.Module.state_dict` has its keys, and ``load_state_dict`` takes them and floating-point
    weights.

    Args:
        kind: ``"nf4"``, 4-bit NormalFloat in blocks of 64 (Dettmers et al. 2023, arXiv 2305.14314), 4.5 bits a weight;
            ``"nf4-dq"``, with double quantisation, 4.13 bits; ``"int8"``, integers with a scale for each row.
        exclude: names of modules to leave out, by the rules of ``target_modules``.

    Returns:
        What was quantised and what not.

    Raises:
        ValueError: the model is quantised or adapted, ``exclude`` hits nothing, there is nothing to quantise, or a
            weight holds NaN or infinity. Nothing is changed then.
    """
    decided = plan_quantization(model, kind, exclude=exclude)
    apply_quantization(model, decided)
    return decided


def apply_quantization(model: nn.Module, decided: QuantizationPlan) -> None:
    """Quantise the layers of a plan in place, one after another; a model that the plan was applied to stays as it is.

    Raises:
        ValueError: a weight holds NaN or infinity. Nothing is changed then.
    """
    if quantization_of(model) is not None:
        return
    modules = _modules(model)
    bad = [name for name in decided.layers if not _is_finite(modules[name])]
    if bad:
        raise ValueError(f"{listed(bad)} hold NaN or infinity, which cannot be quantised: load a base without them")
    for name in decided.layers:
        quantize_parameters(modules[name], {"weight": decided.kind}, QuantizedLinear)
    run_at_injection()
    model.register_load_state_dict_pre_hook(check_state)
    (compiled_module(model) or model).lora_quantization = decided  # type: ignore[assignment]  # a plain attribute


def quantization_of(model: nn.Module) -> QuantizationPlan | None:
    """Return what :func:`quantize` did to this very model, or ``None``."""
    return (compiled_module(model) or model).__dict__.get("lora_quantization")


def check_form(former: QuantizationPlan | None, kind: Quantization, exclude: str | Sequence[str] | None) -> None:
    """Raise ``ValueError`` where a base has another form than ``quantize=kind`` asks for, and no longer can have it."""
    check_kind(kind)
    if former is None:
        raise ValueError(
            f"quantize={kind!r} is for a model without adapters, and this one has them over a base that is not "
            "quantised: call remove(model) first, or leave quantize out"
        )
    if (former.kind, former.exclude) != (kind, _plain(exclude)):
        raise ValueError(
            f"the base is quantised with quantize={former.kind!r}, quantize_exclude={former.exclude!r}, and "
            f"quantize={kind!r}, quantize_exclude={_plain(exclude)!r} are asked for: build the base anew from its "
            "floating-point weights"
        )


def check_kind(kind: Any) -> None:
    """Raise ``ValueError`` for a word that is no form."""
    if kind not in get_args(Quantization):
        raise ValueError(f"quantize must be one of {', '.join(map(repr, get_args(Quantization)))}, got {kind!r}")


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
    modules = _modules(model)
    _check_not_foreign(modules)
    for name, module in modules.items():
        if isinstance(module, QuantizedModule):
            raise ValueError(f"{name!r} is quantised: quantise a base once, from its floating-point weights")
        if isinstance(module, LoRALayer):
            raise ValueError(f"{name!r} is adapted: quantise the base before adapters are put in")
    check_hits("quantize_exclude", exclude, modules, type(model).__name__)
    linear = {name: module for name, module in modules.items() if isinstance(module, nn.Linear)}
    left_out = _left_out(model, modules, linear, exclude, keep or {})
    layers = tuple(name for name in linear if name not in left_out)
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no linear layer to quantise" + (f": {left_out}" if left_out else "")
        )
    weights = [modules[name].get_parameter("weight") for name in layers]
    sizes = [FORMS[kind].sizes(weight.shape) for weight in weights]
    return QuantizationPlan(
        kind,
        _plain(exclude),
        layers,
        left_out,
        bytes_before=sum(weight.numel() * weight.element_size() for weight in weights),
        bytes_after=sum(torch.Size(shape).numel() for parts in sizes for shape in parts.values()),
    )


def _check_not_foreign(modules: Mapping[str, nn.Module]) -> None:
    """Raise ``ValueError`` for a base that another package has quantised, or will on its way to a device."""
    for name, module in modules.items():
        method = getattr(
            module, "quantization_method", None
        )  # of transformers' models that it quantised as it built them
        if method is not None:
            where, what = name or type(module).__name__, f"transformers' quantization_config ({method})"
            break
        weight = module._parameters.get("weight") if isinstance(module, nn.Linear) else None
        package = type(module).__module__.partition(".")[0]
        if package == "bitsandbytes" or (weight is not None and stored_as(weight) is not None):
            stored = "" if weight is None else f", stored as {stored_as(weight) or weight.dtype}"
            where, what = name, f"{type(module).__name__} of {package}{stored}"
            break
    else:
        return
    raise ValueError(
        f"{where!r} is quantised already, by {what}: leave quantize= out to adapt it as it is, or load the base in "
        "bfloat16"
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
        parent = name.rpartition(".")[0]
        within = next((why for path, why in kept.items() if is_inside(name, path)), None)
        if hits(exclude, name) or any(hits(exclude, path) for path in _paths(parent)):
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
    if not is_plain_linear(type(layer)) or weight is None:
        return "has a forward of its own"
    if sum(weight is other for module in modules.values() for other in module._parameters.values()) > 1:
        return "shares its weight"
    if isinstance(modules.get(parent), nn.MultiheadAttention) or reader_of(modules, name) is not None:
        return "another module reads its weight"
    return None


def _plain(exclude: str | Sequence[str] | None) -> str | tuple[str, ...] | None:
    return exclude if exclude is None or isinstance(exclude, str) else tuple(exclude)


def _paths(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def _is_finite(layer: nn.Module) -> bool:
    weight = layer.get_parameter("weight")
    return weight.device.type == "meta" or bool(torch.isfinite(weight).all())


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    return {clean_name(name): module for name, module in model.named_modules()}
