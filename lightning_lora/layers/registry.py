"""Which mixin adapts which kind of base layer. :func:`register` is how a new kind is added."""

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lightning_lora.layers.attention import LoRAMultiheadAttention
from lightning_lora.layers.base import LoRALayer
from lightning_lora.layers.bias import biased_mixin
from lightning_lora.layers.convolution import LoRAConv
from lightning_lora.layers.dora import dora_mixin
from lightning_lora.layers.embedding import LoRAEmbedding
from lightning_lora.layers.linear import LoRAConv1D, LoRALinear, LoRAReadLinear
from lightning_lora.layers.megatron import COLUMN, ROW, LoRAMegatronLinear

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
    COLUMN: LoRAMegatronLinear,
    ROW: LoRAMegatronLinear,
}


# transformers' classes that read the weight of these children instead of calling them, on some path or on all
_READ_BY_PARENT = {
    "WavLMAttention": ("q_proj", "k_proj", "v_proj", "out_proj"),
    "MobileBertLMPredictionHead": ("dense",),
    "MambaMixer": ("dt_proj", "x_proj"),
    "FalconMambaMixer": ("dt_proj", "x_proj"),
    "JambaMambaMixer": ("dt_proj", "x_proj"),
    "BambaMixer": ("out_proj",),
    "Zamba2MambaMixer": ("out_proj",),
    "GraniteMoeHybridMambaLayer": ("out_proj",),
}


def register(base: type[nn.Module] | str, mixin: type[LoRALayer]) -> None:
    """Adapt layers of class ``base`` and its subclasses with ``mixin``.

    Args:
        base: the class, or its full name ``"package.module.Class"`` when importing it is to be avoided.
        mixin: a :class:`LoRALayer` that defines ``features``, ``forward`` and, to be mergeable, ``merged``.
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


def is_read_by_parent(parent: nn.Module, child_name: str) -> bool:
    """Whether ``parent`` reads the weight of its linear child instead of calling the child."""
    return child_name in _READ_BY_PARENT.get(type(parent).__name__, ())


def is_linear(layer: nn.Module) -> bool:
    """Whether ``"all-linear"`` means this layer."""
    mixin = mixin_for(layer)
    return mixin is not None and issubclass(mixin, (LoRALinear, LoRAMegatronLinear))
