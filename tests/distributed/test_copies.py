"""Copies and files of a model that is spread over two gloo ranks: whole, or an error that says what to write."""

import copy
import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from lightning_lora import LoRAConfig, inject, merge
from lightning_lora.fabric import FSDPLoRAStrategy, MegatronLoRAStrategy
from lightning_lora.megatron.models import gpt_model, load_hf_weights
from lightning_lora.ops.sharded import is_sharded, whole
from tests import models
from tests.distributed.gpt import hugging_face
from tests.distributed.ranks import on_ranks
from tests.distributed.split import four_heads
from tests.distributed.training import EXACT

kinds = pytest.mark.parametrize("kind", ["fsdp", "tp", "gpt"])
of_hugging_face = pytest.mark.parametrize("kind", ["fsdp", "tp"])


@pytest.fixture(scope="module")
def source(directory: Path) -> Path:
    """Return where Hugging Face's weights of a GPTModel are."""
    hugging_face().save_pretrained(directory / "hugging face")
    return directory / "hugging face"


def adapted(kind: str, source: Path | None = None) -> Any:
    if kind == "gpt":
        base = gpt_model(str(source))
        load_hf_weights(base, str(source))
    else:
        base = four_heads()
    model = inject(base, LoRAConfig(r=4))
    models.fill_adapters(model)  # of a GPTModel this rank's parts: both ranks' are alike
    return model


def launched(kind: str) -> Fabric:
    strategy: Any = FSDPLoRAStrategy(min_shard_numel=1) if kind == "fsdp" else MegatronLoRAStrategy(2)
    fabric = Fabric(accelerator="cpu", devices=2, strategy=strategy)
    fabric.launch()
    return fabric


def spread(kind: str, source: Path) -> tuple[Any, Any]:
    """Return an adapted model that is spread over the ranks, and its optimizer."""
    fabric = launched(kind)
    model = adapted(kind, source)
    trained = [p for p in model.parameters() if p.requires_grad]
    wrapped, optimizer = fabric.setup(model, torch.optim.AdamW(trained))
    return wrapped.module, optimizer.optimizer  # Fabric's own wrapper gathers to rank 0


def gathered(model: nn.Module) -> dict[str, Tensor]:
    """Return the whole state in the way that torch has for models in shards."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=options)
    return {name: value.clone() for name, value in state.items() if isinstance(value, Tensor)}  # some are the live ones


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}


def ways(model: Any, path: Path) -> dict[str, Callable[[], Any]]:
    """Return what copies a model, a layer or a parameter of it, or writes one to a file, and would keep parts."""
    holder = next(module for module in model.modules() if any(map(is_sharded, module.parameters(recurse=False))))
    part = next(parameter for parameter in holder.parameters(recurse=False) if is_sharded(parameter))
    found = {
        "torch.save(state_dict)": lambda: torch.save(model.state_dict(), path),
        "torch.save(model)": lambda: torch.save(model, path),
        "torch.save(layer)": lambda: torch.save(holder, path),
        "torch.save(parameter)": lambda: torch.save(part, io.BytesIO()),
        "pickle.dumps(model)": lambda: pickle.dumps(model),
        "deepcopy(model)": lambda: copy.deepcopy(model),
        "deepcopy(layer)": lambda: copy.deepcopy(holder),
        "deepcopy(wrapper)": lambda: copy.deepcopy(nn.Sequential(model)),
        "pickle.dumps(parameters)": lambda: pickle.dumps(list(model.parameters())),
        "AveragedModel": lambda: torch.optim.swa_utils.AveragedModel(model),
        "safetensors.save_file": lambda: safetensors.torch.save_file(tensors_of(model), path),
        "safetensors.save_model": lambda: safetensors.torch.save_model(model, str(path)),
    }
    if hasattr(model, "save_pretrained"):
        found["save_pretrained"] = lambda: model.save_pretrained(path.parent / "saved")
        found["inner save_pretrained"] = lambda: model.model.save_pretrained(path.parent / "saved")
    else:  # Megatron-core's models have extra state, which safetensors refuses before it looks at tensors
        found.pop("safetensors.save_model")
    return found


def assert_all_ways_are_refused(model: Any, directory: Path) -> None:
    for name, way in ways(model, directory / f"{os.environ['RANK']}.pt").items():
        with pytest.raises(ValueError, match="spread over ranks") as refused:
            way()
        assert "save_peft(model, directory)" in str(refused.value), name
        assert "merge(YourModule.load_from_checkpoint(path), remove=True)" in str(refused.value), name
    assert not (directory / "saved").exists()


@kinds
@on_ranks(2)
def test_what_would_hold_parts_says_what_to_write(tmp_path: Path, source: Path, kind: str) -> None:
    model, _ = spread(kind, source)
    assert_all_ways_are_refused(model, tmp_path)
    merge(model)
    assert_all_ways_are_refused(model, tmp_path)
    merge(model, remove=True)
    assert_all_ways_are_refused(model, tmp_path)


@on_ranks(2)
def test_megatrons_model_is_in_parts_before_it_is_placed(source: Path) -> None:
    launched("gpt")
    model = adapted("gpt", source)
    with pytest.raises(ValueError, match=r"save_peft\(model, directory\)"):
        copy.deepcopy(model)


@of_hugging_face
@on_ranks(2)
def test_state_dict_has_the_shapes_and_gathered_the_values_of_one_process(source: Path, kind: str) -> None:
    model, _ = spread(kind, source)
    expected = adapted(kind).state_dict()
    assert {n: v.shape for n, v in tensors_of(model).items()} == {n: v.shape for n, v in expected.items()}
    values = gathered(model)
    if os.environ["RANK"] == "0":
        torch.testing.assert_close(values, dict(expected), **EXACT)


@on_ranks(2)
def test_gathered_state_dict_of_megatrons_model_holds_hugging_faces_weights(source: Path) -> None:
    values, theirs = gathered(spread("gpt", source)[0]), hugging_face().state_dict()
    first = "model.layers.0"
    expected = {
        "embedding.word_embeddings.weight": theirs["model.embed_tokens.weight"],
        "output_layer.weight": theirs["lm_head.weight"],
        "decoder.layers.0.self_attention.linear_proj.weight": theirs[f"{first}.self_attn.o_proj.weight"],
        "decoder.layers.0.mlp.linear_fc1.weight": torch.cat(
            [theirs[f"{first}.mlp.gate_proj.weight"], theirs[f"{first}.mlp.up_proj.weight"]]
        ),
    }
    if os.environ["RANK"] == "0":
        torch.testing.assert_close({name: values[name] for name in expected}, expected, **EXACT)


@torch.no_grad()
def scale_trained(model: nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.mul_(3.0)


@kinds
@on_ranks(2)
def test_copies_of_the_state_dict_and_whole_tensors_are_loaded_each_rank_its_parts(source: Path, kind: str) -> None:
    model, _ = spread(kind, source)
    kept, before = copy.deepcopy(model.state_dict()), gathered(model)
    scale_trained(model)
    scaled = gathered(model)
    model.load_state_dict(kept)
    after = gathered(model)
    halves = {name: torch.full(value.shape, 0.5) for name, value in tensors_of(model).items()}
    model.load_state_dict(halves, strict=False)  # Megatron-core's extra state aside
    loaded = gathered(model)
    if os.environ["RANK"] == "0":
        torch.testing.assert_close(after, before, **EXACT)
        moved = [name for name, value in scaled.items() if not torch.equal(value, before[name])]
        assert moved
        assert all("lora_" in name for name in moved)
        expected = {name: torch.full_like(value, 0.5) for name, value in loaded.items()}
        torch.testing.assert_close(loaded, expected, **EXACT)


@of_hugging_face
@on_ranks(2)
def test_merged_for_good_the_gathered_state_is_the_merged_model(tmp_path: Path, source: Path, kind: str) -> None:
    model, _ = spread(kind, source)
    merge(model, remove=True)
    plain = gathered(model)
    if os.environ["RANK"] == "0":
        # parts of a product are summed in another order
        merged = merge(adapted(kind), remove=True)
        torch.testing.assert_close(plain, dict(merged.state_dict()), rtol=1e-6, atol=1e-6)
        model.save_pretrained(tmp_path, state_dict=dict(plain))  # which empties it
        again = type(merged).from_pretrained(tmp_path)
        torch.testing.assert_close(dict(again.state_dict()), plain, **EXACT)


def step(optimizer: Any, gradient: float) -> None:
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.full_like(parameter, gradient)
    optimizer.step()


def moments(optimizer: Any) -> dict[int, Tensor]:
    state = optimizer.state_dict()["state"]
    return {index: whole(entry["exp_avg"]).clone() for index, entry in state.items()}


@kinds
@on_ranks(2)
def test_moments_are_whole_in_an_optimizers_state(tmp_path: Path, source: Path, kind: str) -> None:
    model, optimizer = spread(kind, source)
    step(optimizer, 1.0)
    first = moments(optimizer)
    # the first moment of gradients of one; Hugging Face's and Megatron's layers have other numbers of parameters
    trained = [torch.full(value.shape, 0.1) for name, value in tensors_of(model).items() if "lora_" in name]
    torch.testing.assert_close(list(first.values()), trained)
    kept = copy.deepcopy(optimizer.state_dict())
    step(optimizer, 3.0)
    assert not any(map(torch.equal, moments(optimizer).values(), trained))
    optimizer.load_state_dict(kept)
    torch.testing.assert_close(moments(optimizer), first, **EXACT)
    doubled = {index: 2 * value for index, value in first.items()}
    state = {index: {**entry, "exp_avg": doubled[index]} for index, entry in kept["state"].items()}
    optimizer.load_state_dict({**kept, "state": state})
    torch.testing.assert_close(moments(optimizer), doubled, **EXACT)
    if kind != "fsdp":  # parts of moments are not written by one rank
        with pytest.raises(ValueError, match=r"fabric\.save\(path, state\)"):
            torch.save(optimizer.state_dict(), tmp_path / f"{os.environ['RANK']}.pt")


@on_ranks(1)
def test_one_rank_of_tensor_parallelism_writes_the_whole_model(tmp_path: Path) -> None:
    fabric = Fabric(accelerator="cpu", devices=1, strategy=MegatronLoRAStrategy())
    fabric.launch()
    model = fabric.setup_module(adapted("tp")).module
    torch.save(model.state_dict(), tmp_path / "alone.pt")
    torch.testing.assert_close(torch.load(tmp_path / "alone.pt"), dict(adapted("tp").state_dict()), **EXACT)
