"""Cut packed weights between blocks, so that each tensor-parallel rank multiplies by a part of the very same bytes."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from lightning_lora.layers.packed_parameter import ROW_PARTS
from lightning_lora.layers.quantized import QuantizedModule
from lightning_lora.ops.four_bit import BLOCK
from lightning_lora.ops.packed import Int8
from lightning_lora.ops.sharded import split_over


def check_blocks(name: str, layer: QuantizedModule, kind: str, ranks: int) -> None:
    """Raise ``ValueError`` for a linear layer whose parts would begin or end inside a block.

    Args:
        kind: ``"column"`` or ``"row"``.
    """
    stored = layer.quantized["weight"]
    if isinstance(stored, Int8):
        return
    rows, columns = stored.shape
    length = rows // ranks * columns if kind == "column" else columns // ranks
    if length % BLOCK:
        what = f"{rows // ranks} rows of {columns}" if kind == "column" else f"{columns // ranks} columns"
        raise ValueError(
            f"{name!r} is quantised in blocks of {BLOCK} values of a row, and tensor_parallel_size={ranks} would cut "
            f"through them: each rank has {what}. Leave the layer in 16 bits (quantize_exclude={name!r}), run on "
            "another number of tensor-parallel ranks, or give quantize='int8', which has a scale for each row"
        )


def keep_packed_part(layer: Any, mesh: DeviceMesh, kind: str) -> None:
    """Replace the packed weight of a linear layer by this rank's part of its bytes, in tagged tensors of their own."""
    stored, ranks, rank = layer.quantized["weight"], mesh.size(), mesh.get_local_rank()
    rows, columns = stored.shape
    is_column = kind == "column"
    shape = torch.Size((rows // ranks, columns) if is_column else (rows, columns // ranks))
    if isinstance(stored, Int8) and not is_column:
        _keep(layer, "weight_codes", layer.weight_codes.chunk(ranks, 1)[rank], mesh, 1)
        layer.quantized["weight"] = replace(stored, shape=shape)  # a row has one scale, which is every rank's
        return
    # blocks of the whole weight that lie together: all of them, or those of a row
    runs = 1 if is_column else rows
    for part in ROW_PARTS:
        whole = layer.get_parameter(f"weight_{part}")
        own = whole.view(runs, -1, whole.shape[1]).chunk(ranks, 1)[rank].reshape(-1, whole.shape[1])
        _keep(layer, f"weight_{part}", own, mesh, 0, runs)
    blocks = whole.shape[0] // runs
    place = (rank * blocks // ranks, blocks // ranks, blocks)
    layer.quantized["weight"] = replace(stored, shape=shape, place=place)


def _keep(layer: nn.Module, name: str, own: Tensor, mesh: DeviceMesh, dim: int, stripes: int = 1) -> None:
    part = nn.Parameter(own.detach().clone(), requires_grad=False)
    split_over(part, mesh, dim, stripes)
    layer._parameters[name] = part
