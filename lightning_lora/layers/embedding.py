"""Adapted embeddings: ``y = E[ids] + scaling * A^T[ids] B^T``."""

import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from lightning_lora.layers.base import LoRALayer
from lightning_lora.layers.read_weight import ReadWeight
from lightning_lora.layers.stored import stored_form
from lightning_lora.ops.quantized import check_plain


class LoRAEmbedding(LoRALayer):
    """``nn.Embedding`` with ``lora_A`` ``[r, num_embeddings]`` and ``lora_B`` ``[embedding_dim, r]``.

    Here A starts at zero and B does not, as in PEFT. There is no dropout: the input is an index.
    """

    uses_init = False

    weight: Tensor  # [num_embeddings, embedding_dim]
    padding_idx: int | None

    @classmethod
    @override
    def features(cls, layer: nn.Module) -> tuple[int, int]:
        return int(layer.num_embeddings), int(layer.embedding_dim)  # type: ignore[arg-type]

    @classmethod
    @override
    def check(cls, layer: nn.Module) -> None:
        form = stored_form(layer)
        if form is None:
            check_plain("its weight", layer._parameters.get("weight"))
        else:
            form.read(layer)  # raises for what cannot be read
        if getattr(layer, "max_norm", None) is not None:
            raise ValueError("its max_norm rescales the frozen weight in every forward")
        if getattr(layer, "sparse", False):
            raise ValueError("sparse=True asks for sparse gradients, which the adapter's factors do not have")
        is_known = form is not None or type(layer).forward is nn.Embedding.forward or hasattr(layer, "embed_scale")
        if not is_known:
            raise ValueError(f"{type(layer).__name__} has a forward of its own, which the adapter's term would bypass")

    @override
    def forward(self, input: Tensor) -> Tensor:
        y: Tensor = self.base_forward(input)
        if not self.lora_active:
            return y
        h = F.embedding(input, self.lora_A.t(), self.padding_idx)  # [..., r]
        scaling = self.lora_scaling * getattr(self, "embed_scale", 1.0)  # Gemma scales what it looks up
        return y + (F.linear(h.to(y.dtype), self.lora_B.to(y.dtype)) * scaling).to(y.dtype)

    @override
    def as_matrix(self, weight: Tensor) -> Tensor:
        return weight.t()

    @override
    def from_matrix(self, matrix: Tensor) -> Tensor:
        return matrix.t()


class LoRAReadEmbedding(ReadWeight, LoRAEmbedding):
    """An embedding whose weight a module around it reads, such as the queries of a detector."""
