"""Adapted convolutions: ``y = conv(x) + scaling * conv1x1(conv(dropout(x), A), B)``."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from lightning_lora.layers.base import LoRALayer
from lightning_lora.ops.dropout import keep_entries
from lightning_lora.ops.quantized import check_plain

_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_OWN_FORWARDS = (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)


class LoRAConv(LoRALayer):
    """``nn.Conv1d``, ``nn.Conv2d`` and ``nn.Conv3d``, with groups, dilation and padding modes.

    ``lora_A`` is ``[r, in_channels, *kernel_size]``, an ungrouped convolution with the base's stride, padding and
    dilation; ``lora_B`` is ``[out_channels, r / groups, 1, ...]``, grouped as the base is (PEFT's layout).
    """

    weight: Tensor  # [out_channels, in_channels / groups, *kernel_size]
    stride: tuple[int, ...]
    padding: str | tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    padding_mode: str

    @classmethod
    @override
    def features(cls, layer: nn.Module) -> tuple[int, int]:
        size = int(layer.in_channels)  # type: ignore[arg-type]
        for k in layer.kernel_size:  # type: ignore[union-attr]
            size *= int(k)
        return size, int(layer.out_channels)  # type: ignore[arg-type]

    @classmethod
    @override
    def shapes(cls, layer: nn.Module, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        base: Any = layer
        kernel = tuple(base.kernel_size)
        if r % base.groups:
            raise ValueError(f"r={r} is not a multiple of its groups={base.groups}: give it such a rank (rank_pattern)")
        return (r, base.in_channels, *kernel), (base.out_channels, r // base.groups, *(1 for _ in kernel))

    @classmethod
    @override
    def check(cls, layer: nn.Module) -> None:
        check_plain("its weight", layer._parameters.get("weight"))
        if type(layer).forward not in _OWN_FORWARDS:
            raise ValueError(f"{type(layer).__name__} has a forward of its own, which the adapter's term would bypass")

    @override
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(x)
        if not self.lora_active:
            return y
        seed = self.dropout_seed()
        if seed is not None:
            x = keep_entries(x, seed, self.lora_dropout)
        return y + self._term(x).to(y.dtype)

    def _term(self, x: Tensor) -> Tensor:
        """Return what the adapter adds for an input whose entries were dropped already."""
        convolve: Any = _CONVOLUTIONS[self.lora_A.ndim - 2]
        padding = self.padding
        if self.padding_mode != "zeros":
            both: Any = self._reversed_padding_repeated_twice
            x, padding = F.pad(x, both, mode=self.padding_mode), (0,) * (self.lora_A.ndim - 2)
        h = convolve(x, self.lora_A.to(x.dtype), None, self.stride, padding, self.dilation)
        # scale h, not the output: r channels instead of out_channels
        term: Tensor = convolve(h * self.lora_scaling, self.lora_B.to(h.dtype), groups=self.groups)
        return term

    @override
    def factors(self) -> tuple[Tensor, Tensor]:
        return self.lora_A.flatten(1), self.lora_B.flatten(1)

    @override
    def as_matrix(self, weight: Tensor) -> Tensor:
        return weight.flatten(1)

    @override
    def from_matrix(self, matrix: Tensor) -> Tensor:
        return matrix.view(self.base_weight.shape)

    @override
    def merge_obstacle(self) -> str | None:
        if self.groups == 1:
            return None
        return (
            f"it is a convolution with groups={self.groups}, and its adapter mixes all input channels, which a grouped "
            "weight cannot hold"
        )
