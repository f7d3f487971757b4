"""Megatron-core's linear layers with a packed weight: each rank packs the rows, or the columns, that it holds.

Blocks lie inside a row of a rank's part. So the ranks together hold the very bytes that one process makes of the whole
weight, and of Hugging Face's weights that it stacks.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_lora.checkpoint.hashes import summed
from lightning_lora.layers.quantized import QuantizedModule
from lightning_lora.layers.quantized_linear import register_packing
from lightning_lora.megatron.core import LAYERS, collectives, is_parallel_linear
from lightning_lora.megatron.parts import keep_parts
from lightning_lora.ops.four_bit import BLOCK
from lightning_lora.ops.packed_stack import PackedMatrix
from lightning_lora.ops.sample_hash import sample_hash
from lightning_lora.ops.stored import stored_linear


class QuantizedMegatronLinear(QuantizedModule):
    """Mixin of column- and row-parallel layers with a packed weight.

    ``weight`` reads as a :class:`PackedMatrix`, which Megatron-core's forward hands to the local product. The product
    makes it dense, and again for the gradient of x.
    """

    @override
    def __getattr__(self, name: str) -> Any:
        if name == "weight" and name in self.__dict__.get("quantized", ()):
            return PackedMatrix(self.stored(name))
        return super().__getattr__(name)

    def _forward_impl(
        self,
        input: Tensor,
        weight: PackedMatrix,
        bias: Tensor | None = None,
        *,
        allreduce_dgrad: bool = False,
        sequence_parallel: bool = False,
        tp_group: Any = None,
        **_: Any,
    ) -> Tensor:
        """Return ``x W^T + b`` of this rank's part: what Megatron-core computes beside a frozen weight."""
        if sequence_parallel:
            gather = collectives().gather_from_sequence_parallel_region
            input = gather(input, tensor_parallel_output_grad=True, group=tp_group)
        elif allreduce_dgrad:
            input = collectives().copy_to_tensor_model_parallel_region(input, group=tp_group)
        return stored_linear(input, weight.stored, bias)


def check_rows(kind: str, layers: Mapping[str, nn.Module]) -> None:
    """Raise ``ValueError`` for a form that is not served, and for a layer whose blocks would not end with its rows."""
    linear = {name: layer for name, layer in layers.items() if is_parallel_linear(layer)}
    if linear and kind != "nf4":
        raise ValueError(
            f"quantize={kind!r} is not served for Megatron-core's GPTModel, whose ranks would have scales of their "
            "own: give quantize='nf4'"
        )
    for name, layer in linear.items():
        width = layer.get_parameter("weight").shape[1]
        if width % BLOCK:
            raise ValueError(
                f"{name!r} would be quantised in blocks of {BLOCK} values, and a rank has rows of {width}: leave the "
                f"layer in 16 bits (quantize_exclude={name!r}), or run on another number of tensor-parallel ranks"
            )


@contextmanager
def packing_parts(model: nn.Module) -> Iterator[None]:
    """Tag the parts of weights before they are packed, and the packed parts, and sum their hashes over ranks.

    Called on all ranks, which sum two integers for each weight.
    """
    keep_parts(model)
    yield
    keep_parts(model)
    layers = [module for module in model.modules() if isinstance(module, QuantizedMegatronLinear)]
    known = [layer for layer in layers if "weight" in layer.origins]
    likes = [layer.get_parameter("weight_codes") for layer in known]
    weights = [torch.tensor(layer.origins["weight"].value) for layer in known]
    codes = [
        sample_hash(like.view(layer.quantized["weight"].code_dtype), like)
        for layer, like in zip(known, likes, strict=True)
    ]
    sums = summed([*weights, *codes], likes * 2).tolist()
    for layer, value, code in zip(known, sums[: len(known)], sums[len(known) :], strict=True):
        layer.origins["weight"] = layer.origins["weight"]._replace(value=value, codes=code)


register_packing(f"{LAYERS}.ColumnParallelLinear", QuantizedMegatronLinear)
register_packing(f"{LAYERS}.RowParallelLinear", QuantizedMegatronLinear)
