"""Adapt the packed input projection of ``nn.MultiheadAttention``; its output projection is a layer of its own."""

from typing import Any

from torch import Tensor, nn
from typing_extensions import override

from lightning_lora.layers.base import LoRALayer
from lightning_lora.ops.quantized import check_plain


class LoRAMultiheadAttention(LoRALayer):
    """``in_proj_weight`` reads as ``W + scaling * B A``, with A ``[r, embed_dim]`` and B ``[3 embed_dim, r]``.

    The parent's own code, the fused path too, then sees the adapter. Dropout has no input to act on here and does
    nothing, as in PEFT. ``out_proj`` is adapted with it.
    """

    base_name = "in_proj_weight"
    can_mix = False

    @classmethod
    @override
    def features(cls, layer: nn.Module) -> tuple[int, int]:
        size = int(layer.embed_dim)  # type: ignore[arg-type]
        return size, 3 * size

    @classmethod
    @override
    def check(cls, layer: nn.Module) -> None:
        base: Any = layer
        if not base.embed_dim == base.kdim == base.vdim:
            raise ValueError(
                f"its keys and values have other widths (kdim={base.kdim}, vdim={base.vdim}) than its queries "
                f"({base.embed_dim}), so that it holds three weights; its out_proj can be adapted by name"
            )
        check_plain("its in_proj_weight", base._parameters.get("in_proj_weight"))

    @property
    def in_proj_weight(self) -> Tensor:
        """The effective weight of queries, keys and values: ``[3 embed_dim, embed_dim]``."""
        return self.merged() if self.reads_effective else self.base_weight
