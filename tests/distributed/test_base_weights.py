"""Files that cannot fill a base on the meta device are one clear error that says what to do."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from lightning_lora import LoRAConfig, inject
from lightning_lora.distributed.base_weights import materialize
from lightning_lora.model.base_files import open_slices
from tests import models
from tests.distributed.hand_written import GPT, Positions
from tests.distributed.ranks import on_ranks
from tests.distributed.sharded import fill


def empty_llama() -> torch.nn.Module:
    with torch.device("meta"):
        return inject(models.llama(), LoRAConfig(r=2))


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "lm_head.weight"])
def test_another_vocabulary_says_how_to_resize(tmp_path: Path, name: str):
    base = models.llama()
    base.resize_token_embeddings(104, mean_resizing=False)
    state = base.state_dict()
    kept = {other: value if other == name else value[:100] for other, value in state.items()}
    base.save_pretrained(tmp_path, state_dict=kept)
    with pytest.raises(ValueError, match=r"\(104, 32\) for '.*', the model has \(100, 32\).*") as raised:
        materialize(empty_llama(), str(tmp_path), torch.device("cpu"))
    assert name in str(raised.value)
    assert "call model.resize_token_embeddings(104) before the model is adapted" in str(raised.value)


def test_another_size_of_a_layer_does_not(tmp_path: Path):
    base = models.llama()
    state = base.state_dict()
    state["model.layers.0.mlp.up_proj.weight"] = torch.zeros(100, 32)
    base.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match=r"the model has \(64, 32\)$"):
        materialize(empty_llama(), str(tmp_path), torch.device("cpu"))


def lacking(weights: Path) -> None:
    tensors = safetensors.torch.load_file(weights / "model.safetensors")
    kept = {name: value for name, value in tensors.items() if "layers.1.mlp.up_proj" not in name}
    safetensors.torch.save_file(kept, weights / "model.safetensors")


def of_another_shape(weights: Path) -> None:
    tensors = safetensors.torch.load_file(weights / "model.safetensors")
    tensors["lm_head.weight"] = torch.ones(7, 32)
    safetensors.torch.save_file(tensors, weights / "model.safetensors")


def truncated(weights: Path) -> None:
    whole = (weights / "model.safetensors").read_bytes()
    (weights / "model.safetensors").write_bytes(whole[: len(whole) // 2])


def without_a_shard(weights: Path) -> None:
    index = json.loads((weights / "model.safetensors.index.json").read_text())
    (weights / sorted(set(index["weight_map"].values()))[1]).unlink()


DAMAGES: list[tuple[Callable[[Path], None], str]] = [
    (lacking, r"lacks 1 tensors of LlamaForCausalLM: model\.layers\.1\.mlp\.up_proj\.weight"),
    (of_another_shape, r"has \(7, 32\) for 'lm_head.weight', the model has \(100, 32\)"),
    (truncated, "cannot be read as safetensors"),
    (without_a_shard, "names 'model-00002-of.*', which is not there"),
]


@pytest.fixture
def damaged(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, str]:
    damage, message = request.param
    models.llama().save_pretrained(tmp_path, max_shard_size="50KB" if damage is without_a_shard else "5GB")
    damage(tmp_path)
    return tmp_path, message


@pytest.mark.parametrize("damaged", DAMAGES, indirect=True, ids=[damage.__name__ for damage, _ in DAMAGES])
@on_ranks(2)
def test_weights_that_cannot_fill_the_model_are_one_clear_error(damaged: tuple[Path, str]) -> None:
    weights, message = damaged
    model = models.on_meta(AutoModelForCausalLM, weights)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        fill(model, base_weights=str(weights))


@on_ranks(2)
def test_weights_that_nobody_names_or_computes_are_one_clear_error(tmp_path: Path) -> None:
    def empty_of(build: Callable[[], nn.Module]) -> nn.Module:
        with torch.device("meta"):
            return build()

    with pytest.raises((ValueError, FileNotFoundError), match="no safetensors at"):
        fill(empty_of(GPT), base_weights=str(tmp_path))
    with pytest.raises(ValueError, match="nothing says where its weights are: give the strategy base_weights="):
        fill(empty_of(GPT))
    with pytest.raises(ValueError, match="'scale' is a buffer that no checkpoint holds"):
        safetensors.torch.save_file(Positions().state_dict(), tmp_path / "weights.safetensors")
        fill(empty_of(Positions), base_weights=str(tmp_path))


@pytest.mark.parametrize(
    ("prefix", "inner", "message"),
    [
        ("", False, r"without 'model\.': adapt that module alone, by LoRACallback\(module='model'\)"),
        ("model.", True, r"behind 'model\.': save the weights under the model's own names"),
    ],
)
def test_names_that_differ_by_a_prefix_are_told(tmp_path: Path, prefix: str, inner: bool, message: str) -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = GPT()

    saved = tmp_path / "base.safetensors"
    safetensors.torch.save_file({f"{prefix}{name}": value for name, value in GPT().state_dict().items()}, saved)
    with torch.device("meta"):
        outer = Outer()
    model = inject(outer.model if inner else outer, LoRAConfig(r=2))
    with pytest.raises(ValueError, match=message):
        materialize(model, str(saved), torch.device("cpu"))


def test_two_files_with_the_same_tensor_are_refused(tmp_path: Path) -> None:
    for name in ("first", "second"):
        safetensors.torch.save_file({"weight": torch.ones(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(ValueError, match="several files in .* hold 'weight'"), open_slices(str(tmp_path)):
        pass
