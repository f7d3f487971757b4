"""``adapter_tensors`` and ``hot_swap`` on two gloo ranks: what goes between ranks, and files of ``save_peft``."""

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_lora import FSDPLoRAStrategy, adapter_tensors, hot_swap, named_adapter_parameters, save_peft
from lightning_lora.checkpoint import all_ranks
from lightning_lora.ops.sharded import is_part, local_part
from tests.distributed import split
from tests.distributed.ranks import on_ranks
from tests.distributed.training import EXACT, SHARDED, Recorded, fit, rank_of, state


class Collectives(TorchDispatchMode):
    """Notes the elements that this rank gives to every collective inside the block, by the collective's name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        # to wait for a collective, and to wrap its result, sends nothing
        if name.startswith(("_c10d_functional::", "c10d::")) and "_tensor" not in name.removesuffix("_into_tensor"):
            self.calls.append((name.partition("::")[2], args[0].numel()))
        return func(*args, **(kwargs or {}))


def handed_on(model: nn.Module, portable: bool) -> tuple[dict[str, Any], dict[str, Tensor], list[tuple[str, int]]]:
    with Collectives() as between:
        config, tensors = adapter_tensors(model, portable=portable)
        got = dict(tensors)
    return config, got, between.calls


def gathers_of(model: nn.Module) -> list[tuple[str, int]]:
    """Return one gather for every part of an adapter, of this rank's part, and nothing else."""
    parts = [local_part(p).numel() for _, p in named_adapter_parameters(model) if is_part(p)]
    return sorted(("all_gather_into_tensor", numel) for numel in parts)


def check(model: nn.Module, directory: Path) -> None:
    """Compare what is handed on with the files, and swap those in after the adapter moved."""
    for portable in (True, False):
        save_peft(model, directory / str(portable), portable=portable)
        torch.distributed.barrier()
        config, got, calls = handed_on(model, portable)
        expected = safetensors.torch.load_file(directory / str(portable) / "adapter_model.safetensors")
        torch.testing.assert_close(dict(sorted(got.items())), dict(sorted(expected.items())), **EXACT)
        file = json.loads((directory / str(portable) / "adapter_config.json").read_text())
        assert json.loads(json.dumps(config)) == file
        assert sorted(calls) == gathers_of(model)
    trained = state(model)
    with torch.no_grad():
        for _, parameter in named_adapter_parameters(model):
            local_part(parameter).add_(1)
    with Collectives() as between:
        hot_swap(model, directory / "False")
    assert between.calls == []
    torch.testing.assert_close(state(model), trained, **EXACT)


@pytest.mark.parametrize("shards", [False, True])
@on_ranks(2)
def test_fsdp_gathers_adapters_in_shards_and_nothing_of_the_base(tmp_path: Path, shards: bool) -> None:
    module = Recorded()
    strategy = FSDPLoRAStrategy(shard_adapters=shards, **SHARDED)
    fit(None, module, strategy, limit_train_batches=1, lora={"rank_pattern": {"q_proj": 2}})
    assert len(gathers_of(module.model)) == (28 if shards else 0)
    check(module.model, tmp_path)
    if not shards and rank_of()[0] == 0:
        assert len(dict(adapter_tensors(module.model)[1])) == 28  # alone


@on_ranks(2)
def test_tensor_parallelism_gathers_split_factors_and_nothing_of_the_base(tmp_path: Path) -> None:
    _, module = split.run(None, 2, validates=False, limit_train_batches=1)
    assert len(gathers_of(module.model)) == 14
    check(module.model, tmp_path)


@on_ranks(2)
def test_a_gpt_model_hands_on_hugging_faces_names(tmp_path: Path, hf: Path) -> None:
    from tests.distributed.gpt import Module, run

    module = Module(hf)
    run(None, 2, module, limit_train_batches=1)
    names = {name for name, _ in adapter_tensors(module.model)[1]}
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in names
    check(module.model, tmp_path)


@on_ranks(2)
def test_a_gpt_model_with_fused_pairs_swaps_its_own_directory_alone(tmp_path: Path, hf: Path) -> None:
    from tests.distributed.gpt import Module, run

    module = Module(hf)
    run(None, 2, module, limit_train_batches=1, lora={"fused_pairs": True})
    save_peft(module.model, tmp_path)
    torch.distributed.barrier()
    trained = state(module)
    with torch.no_grad():
        for _, parameter in named_adapter_parameters(module.model):
            local_part(parameter).add_(1)
    hot_swap(module.model, tmp_path)
    torch.testing.assert_close(state(module), trained, **EXACT)
    tensors = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    tensors["base_model.model.model.layers.0.self_attn.k_proj.lora_A.weight"] += 1
    torch.distributed.barrier()
    if rank_of()[0] == 0:
        safetensors.torch.save_file(tensors, tmp_path / "adapter_model.safetensors")
    torch.distributed.barrier()
    with pytest.raises(ValueError, match="has values of .*k_proj.lora_A.weight' that the model cannot take"):
        hot_swap(module.model, tmp_path)
    torch.testing.assert_close(state(module), trained, **EXACT)


@on_ranks(2)
def test_one_rank_alone_is_told_that_all_must_call() -> None:
    _, module = split.run(None, 2, validates=False, limit_train_batches=1)
    if rank_of()[0] == 0:
        with (
            mock.patch.object(all_ranks, "PATIENCE_S", 1.0),
            pytest.raises(ValueError, match="adapter_tensors was called on rank 0, and not on rank 1 in time"),
        ):
            adapter_tensors(module.model)
    torch.distributed.barrier()
