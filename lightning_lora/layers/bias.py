"""Adapters with a bias of their own (PEFT's ``lora_bias``): ``y = base(x) + scaling * (B A x + c)``."""

from typing import Any

from torch import Tensor, nn
from typing_extensions import override

from lightning_lora.layers.base import LoRALayer
from lightning_lora.layers.convolution import LoRAConv
from lightning_lora.layers.linear import LoRAConv1D, LoRALinear


class Biased(LoRALayer):
    """A layer whose adapter has ``lora_bias`` ``[out_features]``, zero at first; a merge adds it to the base's bias."""

    adapter_names = ("lora_A", "lora_B", "lora_bias")

    lora_bias: nn.Parameter
    bias: Tensor | None

    @classmethod
    @override
    def more_shapes(cls, layer: nn.Module, r: int) -> dict[str, tuple[int, ...]]:
        return {"lora_bias": (cls.features(layer)[1],)}

    @override
    def base_tensors(self) -> dict[str, Tensor | None]:
        own = {} if self.bias is None else {"bias": self._parameters.get("bias")}
        return {**super().base_tensors(), **own}

    @override
    def merged_tensors(self) -> dict[str, Tensor]:
        own = {} if self.bias is None else {"bias": (self.bias + self.scaled_bias()).to(self.bias.dtype)}
        return {**super().merged_tensors(), **own}

    @override
    def merge_obstacle(self) -> str | None:
        if self.bias is None:
            return "its adapter has a bias (lora_bias=True), and the base layer has none to merge it into"
        return super().merge_obstacle()

    def scaled_bias(self) -> Tensor:
        """Return what the layer adds to its base's bias: ``[out_features]``."""
        return self.lora_bias * self.lora_scaling


class BiasedLinear(Biased, LoRALinear):
    """``nn.Linear``, or a subclass whose own ``forward`` is kept."""

    @override
    def _lora_linear(self, x: Tensor, weight: Any, bias: Tensor | None) -> Tensor:
        own = self.scaled_bias()
        if weight is None:
            term = super()._lora_linear(x, None, None)
            return term + own.to(term.dtype)
        total = own if bias is None else bias + own
        return super()._lora_linear(x, weight, total.to(weight.dtype) if self.lora_stored is None else total)


class BiasedConv1D(BiasedLinear, LoRAConv1D):
    """transformers' ``Conv1D`` (GPT-2)."""


class BiasedConv(Biased, LoRAConv):
    """``nn.Conv1d``, ``nn.Conv2d`` and ``nn.Conv3d``."""

    @override
    def _term(self, x: Tensor) -> Tensor:
        term = super()._term(x)
        return term + self.scaled_bias().view(-1, *(1 for _ in self.stride)).to(term.dtype)
