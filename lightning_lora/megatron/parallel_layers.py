"""Linear layers and embeddings split over tensor-parallel ranks, and their adapters.

Column: rank i holds rows of W and of B; A is whole. Row: rank i holds columns of W and of A; B is whole.

    x --- copy ---+-- W_i x + s B_i A x --+-- y_i        x_i --+-- W_i x_i + s B A_i x_i --+-- sum --- y
    (backward: one sum of dx over ranks)                          (forward: one sum of y over ranks)

The adapter's term is computed where the base's is, between the base's own collectives, so it adds none of its own. The
gradient of the whole factor is then one rank's addend of the true one: it is summed once per optimizer step.
"""

from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_lora.layers.class_swap import SwappedModule
from lightning_lora.layers.linear import LoRALinear
from lightning_lora.layers.quantized_linear import QuantizedLinear
from lightning_lora.layers.split import SplitLinear
from lightning_lora.megatron.core import collectives
from lightning_lora.ops.packed import PackedWeight
from lightning_lora.ops.stored import stored_linear


class ParallelLinear(SplitLinear, nn.Linear):
    """``nn.Linear`` of which each rank holds a part; ``in_features`` and ``out_features`` are the whole's."""

    @override
    def forward(self, x: Tensor) -> Tensor:
        return self.leave(nn.functional.linear(self.enter(x), self.weight, self.local_bias()))


class QuantizedParallelLinear(QuantizedLinear):
    """Mixin of the same with a packed weight, of which each rank holds whole blocks."""

    @override
    def forward(self, input: Tensor) -> Tensor:
        base: Any = self
        y: Tensor = base.leave(stored_linear(base.enter(input), self.stored("weight"), base.local_bias()))
        return y

    @override
    def whole_form(self, name: str) -> PackedWeight:
        return replace(self.quantized[name], shape=torch.Size((self.out_features, self.in_features)), place=None)


class ColumnParallelLinear(ParallelLinear):
    """``weight`` is ``[out_features / ranks, in_features]``."""

    tp_dim = 0

    @override
    def enter(self, x: Tensor) -> Tensor:
        x = collectives().copy_to_tensor_model_parallel_region(x, group=self.tp_group)
        return x

    @override
    def leave(self, y: Tensor) -> Tensor:
        if self.tp_whole_output:
            y = collectives().gather_from_tensor_model_parallel_region(y, group=self.tp_group)
        return y

    @override
    def local_bias(self) -> Tensor | None:
        return self.bias


class RowParallelLinear(ParallelLinear):
    """``weight`` is ``[out_features, in_features / ranks]``; the bias is added once, after the sum."""

    tp_dim = 1

    @override
    def enter(self, x: Tensor) -> Tensor:
        if self.tp_whole_input:
            x = collectives().scatter_to_tensor_model_parallel_region(x, group=self.tp_group)
        return x

    @override
    def leave(self, y: Tensor) -> Tensor:
        total: Tensor = collectives().reduce_from_tensor_model_parallel_region(y, group=self.tp_group)
        return total if self.bias is None else total + self.bias

    @override
    def local_bias(self) -> Tensor | None:
        return None


class LoRAParallelLinear(LoRALinear):
    """A split linear layer with its adapter: ``leave(W_i x_i + scaling * B_i A_i x_i)``."""

    @override
    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        base: Any = self
        if not self.lora_active:
            return super(LoRALinear, self).forward(input)  # type: ignore[no-any-return]  # the base's
        y: Tensor | None = None if self.lora_siblings is None else self.lora_siblings.output(self, input)
        if y is None:
            x = base.enter(input)
            weight = self.weight if self.lora_stored is None else self.lora_stored.product(self, x)
            y = base.leave(self._lora_linear(x, weight, base.local_bias()))
        return y

    @override
    def dropout_columns(self) -> tuple[int, int] | None:
        base: Any = self
        if base.tp_dim == 0:
            return None
        width = self.lora_A.shape[1]
        return torch.distributed.get_rank(base.tp_group) * width, int(base.in_features)

    @override
    def merge_obstacle(self) -> str | None:
        return None


class VocabParallelEmbedding(SwappedModule):
    """Mixin for an ``nn.Embedding`` whose rows are spread over ranks: each looks up its own, the results are summed.

    The base's own ``forward`` runs on them, so that a scaled embedding scales.
    """

    class_prefix: ClassVar[str] = ""

    tp_group: Any
    weight: Tensor  # [num_embeddings / ranks, embedding_dim]

    @property
    def padding_idx(self) -> None:
        """Of no row here: a frozen table has no gradient to keep out of it, and it may be another rank's."""

    @override
    def forward(self, input: Tensor) -> Tensor:
        first = torch.distributed.get_rank(self.tp_group) * self.weight.shape[0]
        elsewhere = (input < first) | (input >= first + self.weight.shape[0])
        rows: Tensor = super().forward((input - first).masked_fill(elsewhere, 0))
        rows = rows.masked_fill(elsewhere.unsqueeze(-1), 0.0)
        rows = collectives().reduce_from_tensor_model_parallel_region(rows, group=self.tp_group)
        return rows
