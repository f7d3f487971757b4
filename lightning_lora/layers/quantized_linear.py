""":class:`QuantizedLinear` and :class:`QuantizedConv1D`: linear layers with a packed weight."""

from typing import Any

from torch import Tensor, nn

from lightning_lora.layers.quantized import QuantizedModule
from lightning_lora.layers.same_code import CONV1D, is_plain_linear
from lightning_lora.layers.stored import register_stored_weight
from lightning_lora.ops.packed import PackedWeight
from lightning_lora.ops.stored import stored_linear


class QuantizedLinear(QuantizedModule):
    """A linear layer with a packed weight; ``isinstance(layer, nn.Linear)`` still holds."""

    in_features: int
    out_features: int
    bias: Tensor | None

    def forward(self, input: Tensor) -> Tensor:
        return stored_linear(input, self.stored("weight"), self.bias)


class QuantizedConv1D(QuantizedModule):
    """transformers' ``Conv1D`` with a packed weight: ``weight`` reads as ``[in_features, out_features]``.

    Packed is its transpose, as transformers packs it: blocks run along a row of ``[out_features, in_features]``.
    """

    packs_transpose = True
    bias: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return stored_linear(x, self.stored("weight"), self.bias)


# by the full name of the class whose forward a layer has
_MIXINS: dict[str, type[QuantizedModule]] = {CONV1D: QuantizedConv1D}


def register_packing(name: str, mixin: type[QuantizedModule]) -> None:
    """Let layers whose forward is that of the class with this full name be packed by ``mixin``."""
    _MIXINS[name] = mixin


def packing_mixin(layer: nn.Module) -> type[QuantizedModule] | None:
    """Return the mixin that packs the weight of a layer that is known to compute a product with it, else ``None``."""
    if isinstance(layer, nn.Linear):
        return QuantizedLinear if is_plain_linear(type(layer)) else None
    owner = next(base for base in type(layer).__mro__ if "forward" in vars(base))
    return _MIXINS.get(f"{owner.__module__}.{owner.__qualname__}")


def _read(layer: Any) -> PackedWeight:
    stored: PackedWeight = layer.stored("weight")
    return stored


register_stored_weight(QuantizedLinear, _read)
register_stored_weight(QuantizedConv1D, _read, is_transposed=True)
