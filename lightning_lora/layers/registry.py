"""Which mixin adapts which kind of base layer. :func:`register` is how a new kind is added."""

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lightning_lora.layers.attention import LoRAMultiheadAttention
from lightning_lora.layers.base import LoRALayer
from lightning_lora.layers.bias import biased_mixin
from lightning_lora.layers.convolution import LoRAConv
from lightning_lora.layers.dora import dora_mixin
from lightning_lora.layers.embedding import LoRAEmbedding, LoRAReadEmbedding
from lightning_lora.layers.linear import LoRAConv1D, LoRALinear, LoRAReadLinear
from lightning_lora.layers.read_weight import ReadWeight

# keys are classes, or full names of classes whose package need not be installed
_MIXINS: dict[type[nn.Module] | str, type[LoRALayer]] = {
    nn.Linear: LoRALinear,
    NonDynamicallyQuantizableLinear: LoRAReadLinear,
    "transformers.pytorch_utils.Conv1D": LoRAConv1D,
    nn.Embedding: LoRAEmbedding,
    nn.Conv1d: LoRAConv,
    nn.Conv2d: LoRAConv,
    nn.Conv3d: LoRAConv,
    nn.MultiheadAttention: LoRAMultiheadAttention,
}


# by mixin, that of a layer whose weight is read
_READ: dict[type[LoRALayer], type[LoRALayer]] = {LoRALinear: LoRAReadLinear, LoRAEmbedding: LoRAReadEmbedding}


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


def with_options(mixin: type[LoRALayer], layer: nn.Module, *, use_dora: bool, lora_bias: bool) -> type[LoRALayer]:
    """Return the mixin that does what ``mixin`` does with a magnitude or a bias, if one is asked for.

    Raises:
        ValueError: a layer of this kind cannot have it; the message says why.
    """
    if use_dora:
        return dora_mixin(mixin, layer)
    return biased_mixin(mixin, layer) if lora_bias else mixin


def read_mixin(mixin: type[LoRALayer], layer: nn.Module, reader: nn.Module) -> type[LoRALayer]:
    """Return the mixin that does what ``mixin`` does for a layer whose weight ``reader`` reads.

    Raises:
        ValueError: there is no weight with the adapter in it that could be read.
    """
    if issubclass(mixin, ReadWeight):
        return mixin
    if mixin not in _READ:
        raise ValueError(
            f"{type(reader).__name__} reads its weight instead of calling it, which would leave the adapter out, and "
            f"the weight of a {type(layer).__name__} cannot include it: leave it out with exclude_modules"
        )
    weight = layer._parameters.get("weight")
    is_stored = weight is not None and weight.is_floating_point()
    return _READ[mixin] if is_stored else mixin  # what is quantised cannot be read as a matrix at all


def is_linear(layer: nn.Module) -> bool:
    """Whether ``"all-linear"`` means this layer."""
    mixin = mixin_for(layer)
    return mixin is not None and mixin.is_linear
