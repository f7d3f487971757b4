"""PiSSA and OLoRA: adapters that start at a part of the base weight, which itself is not changed."""

from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_lora.layers.linear import LoRAConv1D, LoRALinear
from lightning_lora.layers.read_weight import ReadWeight
from lightning_lora.ops.linear import lora_linears
from lightning_lora.ops.linear_tensors import LinearTensors, ScaledDropout, StoredLinearTensors


class ResidualLinear(LoRALinear):
    """``y = x (W - s B0 A0)^T + b + s dropout(x) A^T B^T``, with the starting values A0 and B0 kept beside A and B.

    PEFT subtracts ``s B0 A0`` from the stored weight; here it is subtracted in the product, so that the base does
    not change and the file fits the original base.
    """

    frozen_names = ("lora_A0", "lora_B0")

    lora_A0: nn.Parameter  # [r, in_features], never trained
    lora_B0: nn.Parameter  # [out_features, r], never trained

    @override
    def start(self) -> None:
        """Take the present A and B as the starting values."""
        for name in ("lora_A", "lora_B"):
            values = getattr(self, name).detach().clone()
            self.register_parameter(f"{name}0", nn.Parameter(values, requires_grad=False))

    @override
    def factors(self) -> tuple[Tensor, Tensor]:
        return torch.cat([self.lora_A, self.lora_A0]), torch.cat([self.lora_B, -self.lora_B0], dim=1)

    @override
    def _lora_linear(self, x: Tensor, weight: Any, bias: Tensor | None) -> Tensor:
        kind, term = (
            LinearTensors if self.lora_stored is None else StoredLinearTensors,
            ScaledDropout(self.lora_scaling),
        )
        if not self.drops:
            return lora_linears(x, [kind(weight, bias, *self.factors())], term)[0]
        start = lora_linears(x, [kind(weight, bias, self.lora_A0, -self.lora_B0)], term)[0]
        return start + super()._lora_linear(x, None, None)


class ResidualConv1D(ResidualLinear, LoRAConv1D):
    """The same for transformers' ``Conv1D``."""


class ResidualReadLinear(ReadWeight, ResidualLinear):
    """The same for a linear layer whose parent reads ``weight``."""
