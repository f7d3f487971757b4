"""The form that a base is quantised in: what was decided, what a model has, and which forms cannot be had."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

from torch import nn

from lightning_lora.compat.torch import compiled_module
from lightning_lora.config import Quantization, brief
from lightning_lora.model.names import listed
from lightning_lora.ops.quantized import stored_as


@dataclass(frozen=True)
class QuantizationPlan:
    """What :func:`quantize` will pack.

    Attributes:
        kind: ``"nf4"``, ``"nf4-dq"`` or ``"int8"``.
        exclude: what was asked to be left out.
        layers: names of the layers, in the order of the model.
        stacks: names of the parameters that stack the matrices of experts, in the order of the model.
        left_out: linear layers, and stacks of experts' matrices, that stay as they are, each with the reason.
        bytes_before: of the layers' weights and the stacks.
        bytes_after: of their packed parts.
    """

    kind: Quantization
    exclude: str | tuple[str, ...] | None
    layers: tuple[str, ...]
    stacks: tuple[str, ...]
    left_out: Mapping[str, str] = field(hash=False)
    bytes_before: int
    bytes_after: int

    def __str__(self) -> str:
        stay = "".join(
            f"; as before: {listed([name for name, why in self.left_out.items() if why == reason])} ({reason})"
            for reason in dict.fromkeys(self.left_out.values())
        )
        size, unit = (1e6, "MB") if self.bytes_after >= 1e6 else (1e3, "kB")
        stacks = f" and {len(self.stacks)} stacks of experts' matrices" if self.stacks else ""
        return (
            f"{self.kind}: {len(self.layers)} linear layers{stacks}, {self.bytes_before / size:,.1f} -> "
            f"{self.bytes_after / size:,.1f} {unit}{stay}"
        )


def quantization_of(model: nn.Module) -> QuantizationPlan | None:
    """Return what :func:`quantize` did to this very model, or ``None``."""
    return (compiled_module(model) or model).__dict__.get("lora_quantization")


def check_form(former: QuantizationPlan | None, kind: Quantization, exclude: str | Sequence[str] | None) -> None:
    """Raise ``ValueError`` where a base has another form than ``quantize=kind`` asks for, and no longer can have it."""
    check_kind(kind)
    if former is None:
        raise ValueError(
            f"quantize={kind!r} is for a model without adapters, and this one has them over the base as it is: call "
            "remove(model) first, or leave quantize out"
        )
    wanted = (kind, plain_exclusion(exclude))
    if (former.kind, former.exclude) != wanted:
        raise ValueError(
            f"the base is quantised with quantize={former.kind!r}, quantize_exclude={former.exclude!r}, and "
            f"quantize={kind!r}, quantize_exclude={wanted[1]!r} are asked for: build the base anew from its "
            "floating-point weights"
        )


def check_kind(kind: Any) -> None:
    """Raise ``ValueError`` for a word that is no form."""
    if not isinstance(kind, str) or kind not in get_args(Quantization):
        given = repr(kind) if isinstance(kind, str | int) else f"a {type(kind).__name__}"
        raise ValueError(f"quantize must be one of {', '.join(map(repr, get_args(Quantization)))}, got {given}")


def check_not_foreign(modules: Mapping[str, nn.Module]) -> None:
    """Raise ``ValueError`` for a base that another package has quantised, or will on its way to a device."""
    for name, module in modules.items():
        method = getattr(
            module, "quantization_method", None
        )  # of transformers' models that it quantised as it built them
        if method is not None:
            where, what = name or type(module).__name__, f"transformers' quantization_config ({method})"
            break
        weight = module._parameters.get("weight") if isinstance(module, nn.Linear) else None
        packages = [type(one).__module__.partition(".")[0] for one in (weight, module) if one is not None]
        package = next((one for one in packages if one != "torch"), "torch")
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


def plain_exclusion(exclude: str | Sequence[str] | None) -> str | tuple[str, ...] | None:
    """Return ``quantize_exclude`` as a value that can be compared."""
    names = exclude if isinstance(exclude, Collection) else [exclude]
    if exclude is not None and not all(isinstance(name, str) for name in names):
        raise TypeError(
            f"quantize_exclude={brief(exclude)} must be a list of names, or a regular expression for the whole name"
        )
    return exclude if exclude is None or isinstance(exclude, str) else tuple(exclude)
