"""Read the weights of bitsandbytes' layers: NF4 and FP4, with double quantisation or without, and 8 bits.

The package is not imported: its kernels are there where a model holds its layers.
"""

from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from lightning_lora.compat.bitsandbytes import unpack_from_cpu_format
from lightning_lora.ops.autocast import autocast_dtype
from lightning_lora.ops.packed import Int8, as_bytes
from lightning_lora.ops.stored import copy_after


@dataclass(frozen=True)
class FourBitWeight:
    """A weight of ``Linear4bit``, made dense by bitsandbytes' kernels.

    Attributes:
        codes: two in a byte, seen as the dtype of ``quant_storage``.
        scales: of the blocks, float32; with double quantisation their codes, uint8.
        nested: with double quantisation the scales of the scales, their levels, and the mean that was taken off.
        nested_block: how many scales share one.
        block: how many values share a scale.
        kind: ``"nf4"`` or ``"fp4"``.
    """

    codes: Tensor
    scales: Tensor
    nested: tuple[Tensor, Tensor, Tensor] | None
    nested_block: int
    block: int
    kind: str
    shape: torch.Size
    dtype: torch.dtype

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def dense(self, dtype: torch.dtype) -> Tensor:
        kernels, scales = torch.ops.bitsandbytes, self.scales
        if self.nested is not None:
            absmax, levels, offset = self.nested
            scales = kernels.dequantize_blockwise.default(scales, absmax, levels, self.nested_block, torch.float32)
            scales = scales + offset
        narrow = torch.float32 if dtype == torch.float64 else dtype
        dense: Tensor = kernels.dequantize_4bit.default(
            self.codes, scales.float(), self.block, self.kind, self.shape, narrow
        )
        return dense.to(dtype)

    def after(self, grad: Tensor) -> Self:
        """Return a copy that torch.compile cannot make before ``grad``."""
        return replace(self, codes=copy_after(self.codes, grad), scales=copy_after(self.scales, grad))


def read_4bit(layer: nn.Module) -> FourBitWeight | None:
    """Return the weight of a ``Linear4bit`` or an ``Embedding4bit``; ``None`` before it is quantised."""
    weight: Any = layer._parameters["weight"]
    # the weight's own as long as it is theirs: a copy of the module has another, which does not follow it to a device
    state: Any = getattr(weight, "quant_state", None)
    state = getattr(layer, "quant_state", None) if state is None else state
    if state is None:
        return None
    if getattr(state, "packing_format_for_cpu", False):
        state = unpack_from_cpu_format(weight, state)
    second = getattr(state, "state2", None)
    nested = None if second is None else (second.absmax, second.code, state.offset)
    nested_block = 0 if second is None else second.blocksize
    return FourBitWeight(
        weight, state.absmax, nested, nested_block, state.blocksize, state.quant_type, state.shape, state.dtype
    )


def computes_in_dtype_of(layer: Any, x: Tensor) -> bool:
    """Whether a ``Linear4bit`` computes in the dtype of x, or in autocast's; it has a ``compute_dtype`` of its own."""
    return layer.compute_dtype in (None, autocast_dtype(x) or x.dtype)


def read_8bit(layer: Any) -> Int8 | None:
    """Return the weight of a ``Linear8bitLt`` or an ``Embedding8bit``; ``None`` where it is not in 8 bits.

    The first forward moves codes and scales from the weight to ``layer.state``.
    """
    weight = layer._parameters["weight"]
    scales = getattr(weight, "SCB", None)
    scales = getattr(getattr(layer, "state", None), "SCB", None) if scales is None else scales
    if weight.dtype != torch.int8 or scales is None:
        return None
    codes = weight.data.view(torch.uint8)
    return Int8({"codes": codes, "scales": as_bytes(scales.float())}, weight.shape, torch.float32)


def multiplies_dense(layer: nn.Module, x: Tensor) -> bool:
    """Whether a ``Linear8bitLt`` makes its weight dense: on CPU, in training. Elsewhere x is quantised, too."""
    return x.device.type == "cpu" and layer.training
