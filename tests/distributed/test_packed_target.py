"""Packed weights that are filled a few blocks at a time: of two and three dimensions, and made of several tensors."""

from typing import Any
from unittest import mock

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers.core_model_loading import Chunk, Concatenate, WeightConverter

from lightning_lora import LoRAConfig, inject
from lightning_lora.distributed import packed_target
from lightning_lora.distributed.packed_target import PackedTarget, fill_from_values
from lightning_lora.layers.quantized import QuantizedModule, quantize_parameters
from lightning_lora.model import base_files
from lightning_lora.ops.sample_hash import sample_hash
from lightning_lora.ops.sharded import whole
from tests import models
from tests.distributed.quantized import KINDS, packed_bytes
from tests.distributed.ranks import on_ranks
from tests.distributed.sharded import EVERYTHING, start
from tests.distributed.training import EXACT

SHAPES = [(3, 10, 48), (4, 7, 80), (30, 96), (5, 7)]  # the last is less than a block


def holder(shape: tuple[int, ...], kind: str, seed: int) -> tuple[Any, Tensor]:
    """Return a module with a packed parameter, and the values that it was made from."""
    module = nn.Module()
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    module.weight = nn.Parameter(values.clone(), requires_grad=False)
    quantize_parameters(module, {"weight": kind}, QuantizedModule)
    return module, values


@on_ranks(2)
def test_ranks_quantise_what_one_process_quantises() -> None:
    torch.distributed.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    for kind in KINDS:
        for shape in SHAPES:
            (module, _), (expected, values) = holder(shape, kind, 0), holder(shape, kind, 1)
            fully_shard(module, mesh=mesh)
            with mock.patch.object(packed_target, "_CHUNK", 128):
                is_finite, origin = fill_from_values(PackedTarget(module, "weight"), values)
            parts = {part: whole(tensor) for part, tensor in module.stored("weight").tensors.items()}
            torch.testing.assert_close(parts, dict(expected.stored("weight").tensors), **EXACT)
            torch.distributed.all_reduce(origin)
            assert is_finite
            assert origin == sample_hash(values, values)


def converters(root: nn.Module) -> Any:
    """Return rules by which gate and up are one tensor in a file, and the down projection two."""
    parts = [f"mlp.{half}_proj.weight" for half in ("gate", "up")]
    return [], [
        WeightConverter("mlp.both_proj.weight", parts, operations=[Chunk(dim=0)]),
        WeightConverter(["mlp.first.weight", "mlp.second.weight"], "mlp.down_proj.weight", [Concatenate(dim=0)]),
    ]


@pytest.fixture
def fused(tmp_path: Any) -> Any:
    state = {name: value.clone() for name, value in models.llama().state_dict().items()}
    for block in ("model.layers.0.mlp", "model.layers.1.mlp"):
        halves = [state.pop(f"{block}.{half}_proj.weight") for half in ("gate", "up")]
        state[f"{block}.both_proj.weight"] = torch.cat(halves)
        first, second = state.pop(f"{block}.down_proj.weight").split([12, 20])
        state |= {f"{block}.first.weight": first.clone(), f"{block}.second.weight": second.clone()}
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    return tmp_path


@on_ranks(2)
def test_tensors_that_transformers_fuses_are_quantised_one_at_a_time(fused: Any) -> None:
    with torch.device("meta"):
        model = models.llama()
    inject(model, LoRAConfig(r=2), quantize="nf4-dq")
    with mock.patch.object(base_files, "_rules", converters):
        start(**EVERYTHING, base_weights=str(fused)).setup(model)
    expected = inject(models.llama(), LoRAConfig(r=2), quantize="nf4-dq")
    torch.testing.assert_close(packed_bytes(model), packed_bytes(expected), **EXACT)
