"""Copies and files of a model that is spread over two gloo ranks: whole, or an error that says what to write."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_lora import LoRAConfig, inject, merge
from tests import models
from tests.distributed import copies_script as script
from tests.distributed.launch import launch

EXACT = {"rtol": 0.0, "atol": 0.0}
KINDS = ("fsdp", "tp", "gpt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    directory = tmp_path_factory.mktemp("copies")
    found = launch("copies_script.py", 2, directory)
    return [{**rank, "directory": directory} for rank in found]


@pytest.fixture(scope="module")
def one_process() -> Any:
    return adapted()


def adapted() -> Any:
    model = inject(script.four_heads(), LoRAConfig(r=4))
    models.fill_adapters(model)
    return model


def in_megatron(hugging_face: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors of Hugging Face's first block and embedding under the names that a GPTModel has them by."""
    mlp = "model.layers.0.mlp"
    return {
        "embedding.word_embeddings.weight": hugging_face["model.embed_tokens.weight"],
        "output_layer.weight": hugging_face["lm_head.weight"],
        "decoder.layers.0.self_attention.linear_proj.weight": hugging_face["model.layers.0.self_attn.o_proj.weight"],
        "decoder.layers.0.mlp.linear_fc1.weight": torch.cat(
            [hugging_face[f"{mlp}.gate_proj.weight"], hugging_face[f"{mlp}.up_proj.weight"]]
        ),
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("when", ["refusals", "merged refusals", "plain refusals"])
def test_what_would_hold_parts_says_what_to_write(when: str, kind: str, ranks: list[Any]):
    for rank in ranks:
        assert rank[kind][when]
        for way, outcome in rank[kind][when].items():
            assert outcome.startswith("ValueError"), (way, outcome)
            assert "spread over ranks" in outcome, (way, outcome)
            assert "save_peft(model, directory)" in outcome, (way, outcome)
            assert "merge(YourModule.load_from_checkpoint(path), remove=True)" in outcome, (way, outcome)
    assert not (ranks[0]["directory"] / "saved").exists()


def test_megatrons_model_is_in_parts_before_it_is_placed(ranks: list[Any]):
    assert all("save_peft(model, directory)" in rank["gpt"]["unplaced"] for rank in ranks)


@pytest.mark.parametrize("kind", ["fsdp", "tp"])
def test_state_dict_has_the_shapes_of_one_process(kind: str, ranks: list[Any], one_process: Any):
    expected = {name: list(value.shape) for name, value in one_process.state_dict().items()}
    assert [rank[kind]["shapes"] for rank in ranks] == [expected, expected]


@pytest.mark.parametrize("kind", ["fsdp", "tp"])
def test_gathered_state_dict_equals_one_process(kind: str, ranks: list[Any], one_process: Any):
    torch.testing.assert_close(ranks[0][kind]["whole"], dict(one_process.state_dict()), **EXACT)


def test_gathered_state_dict_of_megatrons_model_holds_hugging_faces_weights(ranks: list[Any]):
    expected = in_megatron(script.hugging_face().state_dict())
    torch.testing.assert_close({name: ranks[0]["gpt"]["whole"][name] for name in expected}, expected, **EXACT)


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_of_the_state_dict_puts_the_model_back(kind: str, ranks: list[Any]):
    found = ranks[0][kind]
    torch.testing.assert_close(found["put back"], found["whole"], **EXACT)
    moved = [name for name, value in found["scaled"].items() if not torch.equal(value, found["whole"][name])]
    assert moved
    assert all("lora_" in name for name in moved)


@pytest.mark.parametrize("kind", KINDS)
def test_whole_tensors_are_loaded_each_rank_its_parts(kind: str, ranks: list[Any]):
    found = ranks[0][kind]["from whole tensors"]
    torch.testing.assert_close(found, {name: torch.full_like(value, 0.5) for name, value in found.items()}, **EXACT)


@pytest.mark.parametrize("kind", ["fsdp", "tp"])
def test_merged_for_good_the_gathered_state_is_the_merged_model(kind: str, ranks: list[Any]):
    model = merge(adapted(), remove=True)
    merged = dict(model.state_dict())
    # parts of a product are summed in another order
    torch.testing.assert_close(ranks[0][kind]["plain"], merged, rtol=1e-6, atol=1e-6)
    again = type(model).from_pretrained(ranks[0]["directory"] / f"given {kind}")
    torch.testing.assert_close(dict(again.state_dict()), ranks[0][kind]["plain"], **EXACT)


@pytest.mark.parametrize("kind", KINDS)
def test_moments_are_whole_in_an_optimizers_state(kind: str, ranks: list[Any]):
    # the first moment of gradients of one; Hugging Face's and Megatron's layers have other numbers of parameters
    shapes = ranks[0][kind]["shapes"]
    trained = [torch.full(shape, 0.1) for name, shape in shapes.items() if "lora_" in name]
    for rank in ranks:
        torch.testing.assert_close(list(rank[kind]["moments"].values()), trained)
        torch.testing.assert_close(rank[kind]["moments put back"], rank[kind]["moments"], **EXACT)
        assert not any(map(torch.equal, rank[kind]["later moments"].values(), trained))
        doubled = {index: 2 * value for index, value in rank[kind]["moments"].items()}
        torch.testing.assert_close(rank[kind]["moments from whole tensors"], doubled, **EXACT)


@pytest.mark.parametrize("kind", ["tp", "gpt"])
def test_moments_of_parts_are_not_written_by_one_rank(kind: str, ranks: list[Any]):
    for rank in ranks:
        assert "fabric.save(path, state)" in rank[kind]["torch.save(moments)"]


def test_one_rank_of_tensor_parallelism_writes_the_whole_model(
    tmp_path_factory: pytest.TempPathFactory, one_process: Any
):
    (rank,) = launch("copies_script.py", 1, tmp_path_factory.mktemp("alone"))
    torch.testing.assert_close(rank["state"], dict(one_process.state_dict()), **EXACT)
