"""Quantise a frozen base in place: its linear layers hold 4 or 8 bits a weight, before adapters are put in."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import nn

from lightning_lora.config import Quantization
from lightning_lora.layers import LoRALayer
from lightning_lora.layers.quantized import QuantizedLinear, QuantizedModule, quantize_parameters
from lightning_lora.layers.read_weight import reader_of
from lightning_lora.layers.same_code import is_plain_linear
from lightning_lora.model.families import output_head
from lightning_lora.model.matching import check_hits, hits
from lightning_lora.model.names import clean_name, is_inside_any, listed
from lightning_lora.model.trained_base import new_heads
from lightning_lora.ops.packed import FORMS
from lightning_lora.ops.quantized import stored_as

ROUTERS = ("gate", "router", "shared_expert_gate")  # linear layers beside a module called "experts"


@dataclass(frozen=True)
class QuantizationPlan:
    """What :func:`quantize` will pack.

    Attributes:
        kind: ``"nf4"``, ``"nf4-dq"`` or ``"int8"``.
        layers: names of the layers, in the order of the model.
        left_out: linear layers that stay as they are, each with the reason.
        bytes_before: of the layers' weights.
        bytes_after: of their packed parts.
    """

    kind: Quantization
    layers: tuple[str, ...]
    left_out: Mapping[str, str]
    bytes_before: int
    bytes_after: int

    def __str__(self) -> str:
        stay = "".join(
            f"; not {listed([name for name, why in self.left_out.items() if why == reason])} ({reason})"
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
    modules = _modules(model)
    bad = [name for name in decided.layers if not _is_finite(modules[name])]
    if bad:
        raise ValueError(f"{listed(bad)} hold NaN or infinity, which cannot be quantised: load a base without them")
    for name in decided.layers:
        quantize_parameters(modules[name], {"weight": kind}, QuantizedLinear)
    return decided


def plan_quantization(
    model: nn.Module, kind: Quantization, *, exclude: str | Sequence[str] | None = None
) -> QuantizationPlan:
    """Decide and check what :func:`quantize` would pack, and change nothing. The model may be on the meta device."""
    if kind not in FORMS:
        raise ValueError(f"quantize must be one of {', '.join(map(repr, get_args(Quantization)))}, got {kind!r}")
    modules = _modules(model)
    for name, module in modules.items():
        if isinstance(module, QuantizedModule):
            raise ValueError(f"{name!r} is quantised: quantise a base once, from its floating-point weights")
        if isinstance(module, LoRALayer):
            raise ValueError(f"{name!r} is adapted: quantise the base before adapters are put in")
    check_hits("quantize_exclude", exclude, modules, type(model).__name__)
    linear = {name: module for name, module in modules.items() if isinstance(module, nn.Linear)}
    left_out = {name: why for name in linear if (why := _reason(model, modules, name, exclude)) is not None}
    layers = tuple(name for name in linear if name not in left_out)
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no linear layer to quantise" + (f": {left_out}" if left_out else "")
        )
    weights = [modules[name].get_parameter("weight") for name in layers]
    sizes = [FORMS[kind].sizes(weight.shape) for weight in weights]
    return QuantizationPlan(
        kind,
        layers,
        left_out,
        bytes_before=sum(weight.numel() * weight.element_size() for weight in weights),
        bytes_after=sum(torch.Size(shape).numel() for parts in sizes for shape in parts.values()),
    )


def _reason(model: nn.Module, modules: Mapping[str, nn.Module], name: str, exclude: Any) -> str | None:
    """Return why a linear layer is left as it is, or ``None``."""
    layer, (parent, _, local) = modules[name], name.rpartition(".")
    weight = layer._parameters.get("weight")
    if hits(exclude, name) or any(hits(exclude, path) for path in _paths(parent)):
        return "excluded"
    if layer is output_head(model) or any(layer is output_head(m) for m in modules.values()):
        return "output head"
    if is_inside_any(name, new_heads(model)):
        return "new task head"
    if local in ROUTERS and f"{parent}.experts".lstrip(".") in modules:
        return "router"
    if not is_plain_linear(type(layer)) or weight is None:
        return "has a forward of its own"
    kind = stored_as(weight)
    if kind is not None:
        return f"stored as {kind}"
    if sum(weight is other for module in modules.values() for other in module._parameters.values()) > 1:
        return "shares its weight"
    if isinstance(modules.get(parent), nn.MultiheadAttention) or reader_of(modules, name) is not None:
        return "another module reads its weight"
    return None


def _paths(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def _is_finite(layer: nn.Module) -> bool:
    weight = layer.get_parameter("weight")
    return weight.device.type == "meta" or bool(torch.isfinite(weight).all())


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    return {clean_name(name): module for name, module in model.named_modules()}
