"""Train single rows of an embedding, such as those of new tokens, without training the whole table."""

from collections.abc import Container, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from lightning_lora.layers.adapt import become_lora_layer
from lightning_lora.layers.base import LoRALayer, Pair
from lightning_lora.layers.read_weight import ReadWeight


class TokenRows(LoRALayer):
    """A layer that reads ``lora_rows`` ``[n, embedding_dim]``, which train, in the place of ``weight[lora_token_ids]``.

    Tied tables share the parameter. It holds the rows themselves, not differences (PEFT's layout).
    """

    adapter_names = ("lora_rows",)

    lora_rows: nn.Parameter
    lora_token_ids: list[int]
    lora_is_twin: bool  # True for a table that is tied to the one whose rows these are
    weight: Tensor  # [num_embeddings, embedding_dim]

    @override
    def pairs(self) -> dict[str, Pair]:
        return {}

    @override
    def merged(self) -> Tensor:
        index = torch.tensor(self.lora_token_ids, device=self.base_weight.device)
        return self.base_weight.index_copy(0, index, self.lora_rows.to(self.base_weight))

    @override
    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {len(self.lora_token_ids)} rows train"


class TokenRowsEmbedding(TokenRows):
    """``nn.Embedding`` with rows that train."""

    @override
    def forward(self, input: Tensor) -> Tensor:
        y: Tensor = self.base_forward(input)
        if not self.lora_active:
            return y
        place = torch.full((self.base_weight.shape[0],), -1, dtype=torch.int64, device=input.device)
        place[torch.tensor(self.lora_token_ids, device=input.device)] = torch.arange(
            len(self.lora_token_ids), device=input.device
        )
        index = place[input]
        rows = F.embedding(index.clamp(min=0), self.lora_rows) * getattr(self, "embed_scale", 1.0)
        return torch.where((index >= 0).unsqueeze(-1), rows.to(y.dtype), y)


class TokenRowsLinear(TokenRows):
    """An output head with rows that train: its own, or those of an embedding that it is tied to."""

    bias: Tensor | None

    @override
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base_forward(x)
        if not self.lora_active:
            return y
        index = torch.tensor(self.lora_token_ids, device=y.device)
        bias = None if self.bias is None else self.bias[index]
        return y.index_copy(-1, index, F.linear(x, self.lora_rows.to(x.dtype), bias).to(y.dtype))


class TokenRowsReadEmbedding(ReadWeight, TokenRowsEmbedding):
    """An embedding whose weight a module around it reads."""


class TokenRowsReadLinear(ReadWeight, TokenRowsLinear):
    """An output head whose weight a module around it reads."""


_MIXINS: dict[tuple[bool, bool], type[TokenRows]] = {  # by: it is an embedding, its weight is read
    (True, False): TokenRowsEmbedding,
    (True, True): TokenRowsReadEmbedding,
    (False, False): TokenRowsLinear,
    (False, True): TokenRowsReadLinear,
}


def check_rows(layer: nn.Module, token_ids: Sequence[int]) -> None:
    """Raise ``ValueError`` for an index outside the table or given twice, or a weight on the meta device."""
    weight: Any = layer.weight
    wrong = [token for token in token_ids if not 0 <= token < weight.shape[0]]
    if wrong or len(set(token_ids)) != len(token_ids) or not token_ids:
        what = f"{wrong[0]} is outside the table of {weight.shape[0]} rows" if wrong else "an index is given twice"
        raise ValueError(f"trainable_token_indices: {what if token_ids else 'the list is empty'}; resize it first?")
    if weight.device.type == "meta":
        raise ValueError("trainable_token_indices: the embedding is on the meta device; load the base first")


def train_rows(
    layer: nn.Module,
    tied: Sequence[nn.Module],
    token_ids: Sequence[int],
    *,
    dtype: torch.dtype | None,
    read: Container[nn.Module] = (),
) -> None:
    """Let the given rows of ``layer`` and of the layers tied to it train, in place, starting at their present values.

    Args:
        read: layers whose weight other modules read.
    """
    weight: Any = layer.weight
    ids = list(token_ids)
    values = weight.detach()[torch.tensor(ids, device=weight.device)].to(dtype or weight.dtype, copy=True)
    rows = nn.Parameter(values)
    for module in (layer, *tied):
        mixin = _MIXINS[isinstance(module, nn.Embedding), module in read]
        attributes: dict[str, Any] = {"lora_token_ids": ids, "lora_is_twin": module is not layer}
        become_lora_layer(module, mixin, scaling=1.0, dropout=0.0, dtype=dtype, **attributes)
        module.register_parameter("lora_rows", rows)
