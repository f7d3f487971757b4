"""DoRA, weight-decomposed adapters: every row of ``W + scaling * B A`` is scaled to a trained length, its magnitude."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from lightning_lora.compat.torch import convolve
from lightning_lora.layers.base import LoRALayer
from lightning_lora.layers.convolution import LoRAConv
from lightning_lora.layers.embedding import LoRAEmbedding, LoRAReadEmbedding
from lightning_lora.layers.linear import LoRAConv1D, LoRALinear, LoRAReadLinear
from lightning_lora.ops.dropout import keep_entries
from lightning_lora.ops.linear import lora_linear
from lightning_lora.ops.stored import stored_linear
from lightning_lora.ops.weights import rescaled, row_norms


class DoRA(LoRALayer):
    """A layer whose weight is ``W' = m V / ||V||`` with ``V = W + scaling * B A`` (Liu et al. 2024, sec. 4.1).

    The norm is taken of each row of V ``[out_features, in_features]`` and is a constant to autograd (sec. 4.3). With
    dropout the base's product is of the dropped input as well, as far as the magnitude changes it, as in PEFT:
    ``y = W x + b + (m / ||V|| - 1) W x_d + (m / ||V||) scaling * B A x_d``.
    """

    adapter_names = ("lora_A", "lora_B", "lora_magnitude")

    lora_magnitude: nn.Parameter  # [out_features]

    @classmethod
    @override
    def more_shapes(cls, layer: nn.Module, r: int) -> dict[str, tuple[int, ...]]:
        return {"lora_magnitude": (cls.features(layer)[1],)}

    def norms(self) -> Tensor:
        """Return the norms of the rows of V: ``[out_features]``, without gradient."""
        return row_norms(self.as_matrix(self.base_weight), *self.factors(), self.lora_scaling)

    @override
    def row_ratio(self) -> Tensor:
        return self.lora_magnitude.flatten() / self.norms()

    @override
    @torch.no_grad()
    def start(self) -> None:
        """Set the magnitude to the present norms, so that the layer is what it is without it."""
        self.lora_magnitude.copy_(self.norms().view_as(self.lora_magnitude))

    def is_at_start(self) -> bool:
        """Whether the magnitude is the present norms', but for the rounding of another device."""
        return bool(
            torch.allclose(self.lora_magnitude.flatten(), self.norms().to(self.lora_magnitude.dtype), rtol=1e-6)
        )


class DoRALinear(DoRA, LoRALinear):
    """``nn.Linear``, or a subclass whose own ``forward`` is kept."""

    @override
    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not self.lora_active:
            return super().forward(input, *args, **kwargs)
        seed = self.dropout_seed()
        if seed is None:
            return rescaled(super().forward(input, *args, **kwargs), self.row_ratio(), self.bias)
        y: Tensor = self.base_forward(input, *args, **kwargs)
        input = keep_entries(input, seed, self.lora_dropout)
        term = lora_linear(input, None, None, *self.factors(), scaling=self.lora_scaling)
        stored = None if self.lora_stored is None else self.lora_stored.read(self)
        if stored is None:
            product = F.linear(input, self.as_matrix(self.base_weight)) + term
        else:
            product = stored_linear(input, stored, None) + term
        return torch.addcmul(y + term, product, self.row_ratio() - 1).to(y.dtype)


class DoRAConv1D(DoRALinear, LoRAConv1D):  # type: ignore[misc]  # its bases call their input by two names
    """transformers' ``Conv1D`` (GPT-2)."""


class DoRAReadLinear(DoRALinear, LoRAReadLinear):
    """A linear layer whose parent reads ``weight``, which reads as ``W'``."""


class DoRAEmbedding(DoRA, LoRAEmbedding):
    """``nn.Embedding``; a magnitude belongs to a column of the table, over all tokens (PEFT's layout)."""

    @override
    def forward(self, input: Tensor) -> Tensor:
        y = super().forward(input)
        return rescaled(y, self.row_ratio(), None) if self.lora_active else y


class DoRAReadEmbedding(DoRAEmbedding, LoRAReadEmbedding):
    """An embedding whose weight a module around it reads, which reads as ``W'``."""


class DoRAConv(DoRA, LoRAConv):
    """``nn.Conv1d``, ``nn.Conv2d`` and ``nn.Conv3d`` without groups; the norm is of a whole kernel.

    ``lora_magnitude`` is ``[1, out_channels, 1, ...]``.
    """

    bias: Tensor | None

    @classmethod
    @override
    def more_shapes(cls, layer: nn.Module, r: int) -> dict[str, tuple[int, ...]]:
        base: Any = layer
        return {"lora_magnitude": (1, base.out_channels, *(1 for _ in base.kernel_size))}

    @override
    def forward(self, x: Tensor) -> Tensor:
        if not self.lora_active:
            return super().forward(x)
        channels = (-1, *(1 for _ in self.stride))
        ratio = self.row_ratio().view(channels)
        seed = self.dropout_seed()
        if seed is None:
            return rescaled(super().forward(x), ratio, None if self.bias is None else self.bias.view(channels))
        y: Tensor = super(LoRAConv, self).forward(x)
        x = keep_entries(x, seed, self.lora_dropout)
        term = self._term(x).to(y.dtype)
        product = convolve(self, x, self.weight) + term
        return torch.addcmul(y + term, product, ratio - 1).to(y.dtype)
