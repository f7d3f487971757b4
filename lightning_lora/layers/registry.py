"""Pick the mixin that adapts a base layer: by the layer's type, by what reads its weight, and by the options.

:func:`register` adds a kind.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lightning_lora.layers.adalora import AdaLoRAConv1D, AdaLoRALinear, AdaLoRAReadLinear
from lightning_lora.layers.attention import LoRAMultiheadAttention
from lightning_lora.layers.base import LoRALayer
from lightning_lora.layers.bias import BiasedConv, BiasedConv1D, BiasedLinear
from lightning_lora.layers.convolution import LoRAConv
from lightning_lora.layers.dora import (
    DoRAConv,
    DoRAConv1D,
    DoRAEmbedding,
    DoRALinear,
    DoRAReadEmbedding,
    DoRAReadLinear,
)
from lightning_lora.layers.embedding import LoRAEmbedding, LoRAReadEmbedding
from lightning_lora.layers.linear import LoRAConv1D, LoRALinear, LoRAReadLinear
from lightning_lora.layers.read_weight import ReadWeight, check_not_stored
from lightning_lora.layers.residual import ResidualConv1D, ResidualLinear, ResidualReadLinear
from lightning_lora.layers.same_code import CONV1D
from lightning_lora.layers.stored import stored_form

# keys are classes, or full names of classes whose package need not be installed
_MIXINS: dict[type[nn.Module] | str, type[LoRALayer]] = {
    nn.Linear: LoRALinear,
    NonDynamicallyQuantizableLinear: LoRAReadLinear,
    CONV1D: LoRAConv1D,
    nn.Embedding: LoRAEmbedding,
    nn.Conv1d: LoRAConv,
    nn.Conv2d: LoRAConv,
    nn.Conv3d: LoRAConv,
    nn.MultiheadAttention: LoRAMultiheadAttention,
}


def register(base: type[nn.Module] | str, mixin: type[LoRALayer]) -> None:
    """Adapt layers of class ``base`` and its subclasses with ``mixin``.

    Args:
        base: the class, or its full name ``"package.module.Class"`` when importing it is to be avoided.
        mixin: a :class:`LoRALayer` that defines ``features``, ``forward`` and, to be mergeable, ``merged``. With
            ``is_linear = True`` the word ``"all-linear"`` means these layers too.
    """
    _MIXINS[base] = mixin


def mixin_for(layer: nn.Module) -> type[LoRALayer] | None:
    """Return the mixin of the nearest registered class in the layer's ancestry, or ``None``."""
    for cls in type(layer).__mro__:
        mixin = _MIXINS.get(cls) or _MIXINS.get(f"{cls.__module__}.{cls.__qualname__}")
        if mixin is not None:
            return mixin
    return None


def is_linear(layer: nn.Module) -> bool:
    """Whether ``"all-linear"`` means this layer."""
    mixin = mixin_for(layer)
    return mixin is not None and mixin.is_linear


Variants = dict[type[LoRALayer], type[LoRALayer]]

READ: Variants = {LoRALinear: LoRAReadLinear, LoRAEmbedding: LoRAReadEmbedding}
DORA: Variants = {
    LoRALinear: DoRALinear,
    LoRAConv1D: DoRAConv1D,
    LoRAReadLinear: DoRAReadLinear,
    LoRAEmbedding: DoRAEmbedding,
    LoRAReadEmbedding: DoRAReadEmbedding,
    LoRAConv: DoRAConv,
}
BIASED: Variants = {LoRALinear: BiasedLinear, LoRAConv1D: BiasedConv1D, LoRAConv: BiasedConv}
ADALORA: Variants = {LoRALinear: AdaLoRALinear, LoRAConv1D: AdaLoRAConv1D, LoRAReadLinear: AdaLoRAReadLinear}
RESIDUAL: Variants = {LoRALinear: ResidualLinear, LoRAConv1D: ResidualConv1D, LoRAReadLinear: ResidualReadLinear}


def read_mixin(mixin: type[LoRALayer], layer: nn.Module, reader: nn.Module) -> type[LoRALayer]:
    """Return the variant of ``mixin`` for a layer whose weight ``reader`` reads.

    Raises:
        ValueError: the weight of such a layer cannot include the adapter.
    """
    if issubclass(mixin, ReadWeight):
        return mixin
    if mixin not in READ:
        raise ValueError(
            f"{type(reader).__name__} reads its weight instead of calling it, which would leave the adapter out, and "
            f"the weight of a {type(layer).__name__} cannot include it: leave it out with exclude_modules"
        )
    weight = layer._parameters.get("weight")
    if weight is not None and not weight.is_floating_point():
        return mixin  # whoever reads it gets no matrix: the layer has to be called
    check_not_stored(layer)
    return mixin if weight is None else READ[mixin]


def with_options(
    mixin: type[LoRALayer], layer: nn.Module, *, use_dora: bool = False, lora_bias: bool = False, adalora: bool = False
) -> type[LoRALayer]:
    """Return the variant of ``mixin`` with a magnitude, a bias or ranks that can be pruned, if an option asks for it.

    Raises:
        ValueError: a layer of this kind cannot have it; the message says why.
    """
    if use_dora:
        return _dora_mixin(mixin, layer)
    if adalora:
        if mixin not in ADALORA:
            raise ValueError(f"{type(layer).__name__} is of a kind whose ranks cannot be pruned; linear layers can be")
        return ADALORA[mixin]
    if not lora_bias:
        return mixin
    if issubclass(mixin, ReadWeight):
        raise ValueError("a module around it reads its weight, and would miss the adapter's bias")
    if mixin not in BIASED:
        raise ValueError(f"{type(layer).__name__} is of a kind whose adapter cannot have a bias")
    return BIASED[mixin]


def _dora_mixin(mixin: type[LoRALayer], layer: Any) -> type[LoRALayer]:
    if mixin not in DORA:
        raise ValueError(f"{type(layer).__name__} is of a kind that has no weight-decomposed adapter, here or in PEFT")
    if getattr(layer, "groups", 1) != 1:
        raise ValueError(
            f"it is a convolution with groups={layer.groups}, whose adapter mixes all input channels, so that there is "
            "no sum W + BA to take norms of"
        )
    try:
        dense_weight(layer)
    except ValueError as error:
        raise ValueError(f"the magnitude starts at the norms of its weight: {error}") from None
    return DORA[mixin]


def dense_weight(layer: nn.Module) -> Tensor:
    """Return the base weight as a floating-point tensor, to start an adapter from.

    Raises:
        ValueError: there is none; the message says why.
    """
    form = stored_form(layer)
    weight: Any = layer._parameters.get("weight")
    weight = getattr(layer, "weight", None) if weight is None and form is None else weight
    if form is not None:
        stored = form.read(layer)
        if stored is None or stored.device.type != "meta":
            return form.dense(layer)
        weight = torch.empty(stored.shape, device="meta")
    if not isinstance(weight, Tensor) or weight.is_meta:
        what = "on the meta device: load the base first" if isinstance(weight, Tensor) else "computed"
        raise ValueError(f"the weight of this {type(layer).__name__} is {what}")
    if not weight.is_floating_point():
        raise ValueError(f"the weight of this {type(layer).__name__} is stored as {weight.dtype}")
    return weight
