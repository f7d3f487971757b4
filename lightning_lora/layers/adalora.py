"""AdaLoRA's layers: ``y = base(x) + scaling * dropout(x) (E * A)^T B^T``, with ranks that can be pruned."""

from typing import Any

from torch import Tensor, nn
from typing_extensions import override

from lightning_lora.layers.linear import LoRAConv1D, LoRALinear
from lightning_lora.layers.read_weight import ReadWeight
from lightning_lora.ops.linear import lora_linears
from lightning_lora.ops.linear_tensors import LinearTensors, StoredLinearTensors


class AdaLoRALinear(LoRALinear):
    """``nn.Linear``, or a subclass whose own ``forward`` is kept; a rank whose entry of E is zero is pruned.

    It is not fused with its siblings.
    """

    adapter_names = ("lora_A", "lora_B", "lora_E")
    uses_init = False

    lora_E: nn.Parameter  # [r, 1], zero at first

    @classmethod
    @override
    def more_shapes(cls, layer: nn.Module, r: int) -> dict[str, tuple[int, ...]]:
        return {"lora_E": (r, 1)}

    @override
    def factors(self) -> tuple[Tensor, Tensor]:
        return self.lora_A * self.lora_E, self.lora_B

    @override
    def _lora_linear(self, x: Tensor, weight: Any, bias: Tensor | None) -> Tensor:
        kind = LinearTensors if self.lora_stored is None else StoredLinearTensors
        return lora_linears(x, [kind(weight, bias, *self.factors())], self.scaled_dropout())[0]


class AdaLoRAConv1D(AdaLoRALinear, LoRAConv1D):
    """The same for transformers' ``Conv1D``."""


class AdaLoRAReadLinear(ReadWeight, AdaLoRALinear):
    """The same for a linear layer whose parent reads ``weight``."""
