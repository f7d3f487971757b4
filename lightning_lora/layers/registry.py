"""Pick the mixin that adapts a base layer, by the layer's type. :func:`register` adds a kind."""

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lightning_lora.layers.attention import LoRAMultiheadAttention
from lightning_lora.layers.base import LoRALayer
from lightning_lora.layers.convolution import LoRAConv
from lightning_lora.layers.embedding import LoRAEmbedding
from lightning_lora.layers.linear import LoRAConv1D, LoRALinear, LoRAReadLinear

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
