"""Copies and files of a model that is spread over two gloo ranks are whole."""

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from lightning_lora import merge
from lightning_lora.fabric import MegatronLoRAStrategy
from lightning_lora.ops.sharded import whole
from tests.distributed.gpt import hugging_face
from tests.distributed.ranks import on_ranks
from tests.distributed.spread import adapted, kinds, of_hugging_face, spread, tensors_of
from tests.distributed.training import EXACT


def gathered(model: nn.Module) -> dict[str, Tensor]:
    """Return the whole state in the way that torch has for models in shards."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=options)
    return {name: value.clone() for name, value in state.items() if isinstance(value, Tensor)}  # some are the live ones


@of_hugging_face
@on_ranks(2)
def test_state_dict_has_the_shapes_and_gathered_the_values_of_one_process(hf: Path, kind: str) -> None:
    model, _ = spread(kind, hf)
    expected = adapted(kind).state_dict()
    assert {n: v.shape for n, v in tensors_of(model).items()} == {n: v.shape for n, v in expected.items()}
    values = gathered(model)
    if os.environ["RANK"] == "0":
        torch.testing.assert_close(values, dict(expected), **EXACT)


@on_ranks(2)
def test_gathered_state_dict_of_megatrons_model_holds_hugging_faces_weights(hf: Path) -> None:
    values, theirs = gathered(spread("gpt", hf)[0]), hugging_face().state_dict()
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
def test_copies_of_the_state_dict_and_whole_tensors_are_loaded_each_rank_its_parts(hf: Path, kind: str) -> None:
    model, _ = spread(kind, hf)
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
def test_merged_for_good_the_gathered_state_is_the_merged_model(tmp_path: Path, hf: Path, kind: str) -> None:
    model, _ = spread(kind, hf)
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
def test_moments_are_whole_in_an_optimizers_state(tmp_path: Path, hf: Path, kind: str) -> None:
    model, optimizer = spread(kind, hf)
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
