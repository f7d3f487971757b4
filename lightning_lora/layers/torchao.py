"""Read torchao's weights, which are tensors of a class of their own in the place of a linear layer's weight."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.ops.stored import copy_after, let_copy_after


@dataclass(frozen=True)
class TorchaoWeight:
    """A weight that says its values by ``dequantize()``."""

    tensor: Any

    @property
    def shape(self) -> torch.Size:
        return self.tensor.shape  # type: ignore[no-any-return]

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype  # type: ignore[no-any-return]

    @property
    def device(self) -> torch.device:
        return self.tensor.device  # type: ignore[no-any-return]

    def dense(self, dtype: torch.dtype) -> Tensor:
        dense: Tensor = self.tensor.dequantize()
        return dense.to(dtype)

    def after(self, grad: Tensor) -> "TorchaoWeight":
        """Return a copy that torch.compile cannot make before ``grad``."""
        return TorchaoWeight(copy_after(self.tensor, grad))


def read_weight(layer: nn.Module) -> TorchaoWeight:
    """Return the weight of a linear layer that torchao quantised.

    Raises:
        ValueError: the weight cannot be made dense, or the layer's input is quantised, too.
    """
    weight: Any = layer._parameters["weight"]
    kind = type(weight).__name__
    if type(weight).dequantize is Tensor.dequantize:
        raise ValueError(
            f"its weight is stored as {kind}, which has no dequantize(): gradients through it need its values. Take "
            "another form (Int8WeightOnlyConfig, IntxWeightOnlyConfig, Float8WeightOnlyConfig), or load the base "
            "unquantised"
        )
    for name in ("act_quant_kwargs", "act_pre_scale", "activation_quantization"):
        if getattr(weight, name, None) is not None:
            raise ValueError(
                f"its weight is stored as {kind} with {name}: the input is quantised or scaled, too, which has no "
                "gradient. Quantise weights alone (Int8WeightOnlyConfig, IntxWeightOnlyConfig, Float8WeightOnlyConfig)"
            )
    if not torch.compiler.is_compiling():  # it was read before, when the layer was adapted
        let_copy_after(weight.__class__)
    return TorchaoWeight(weight)
