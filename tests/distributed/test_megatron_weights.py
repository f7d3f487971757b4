"""``load_hf_weights`` on 1 and 2 gloo ranks: files of every form, and those that do not fit."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightning_lora.megatron.models import gpt_model
from lightning_lora.megatron.table import HF_TABLE, Row, row_of
from lightning_lora.megatron.weights import load_hf_weights
from tests.distributed.gpt_families import build, form_groups, loaded
from tests.distributed.ranks import on_ranks
from tests.distributed.training import rank_of


@pytest.fixture(scope="module")
def sources(directory: Path) -> Path:
    """Return the folder in which the weights of two families have a folder each."""
    for name in ("llama", "experts"):
        build(name).save_pretrained(directory / name)
    return directory


def written(folder: Path, tensors: dict[str, Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    return folder


def fused_experts(experts: dict[str, Tensor]) -> dict[str, Tensor]:
    fused = {key: value for key, value in experts.items() if ".experts." not in key}
    for layer in range(2):
        place = f"model.layers.{layer}.mlp.experts"
        gate, up, down = (
            torch.stack([experts[f"{place}.{expert}.{part}_proj.weight"] for expert in range(4)])
            for part in ("gate", "up", "down")
        )
        fused |= {f"{place}.gate_up_proj": torch.cat([gate, up], 1), f"{place}.down_proj": down}
    return fused


@pytest.fixture(scope="module")
def other_forms(sources: Path, directory: Path) -> list[Path]:
    """Return folders of the experts' tensors under other names, stacked, and in several files."""
    experts = load_file(sources / "experts" / "model.safetensors")
    (directory / "in parts").mkdir()
    parts = {f"part{index}.safetensors": dict(list(experts.items())[index::2]) for index in range(2)}
    for file, tensors in parts.items():
        save_file(tensors, directory / "in parts" / file)
    weight_map = {key: file for file, tensors in parts.items() for key in tensors}
    (directory / "in parts" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return [
        written(directory / "base", {key.removeprefix("model."): value for key, value in experts.items()}),
        written(directory / "nested", {f"base_model.model.{key}": value for key, value in experts.items()}),
        written(directory / "fused", fused_experts(experts)),
        directory / "in parts",
    ]


def assert_holds(state: dict[str, Any], expected: dict[str, Any]) -> None:
    for name, value in expected.items():
        if isinstance(value, Tensor):
            assert torch.equal(state[name], value), name


@on_ranks(1, 2)
def test_other_files_and_models_are_filled_alike(sources: Path, other_forms: list[Path]) -> None:
    form_groups()
    expected = loaded(sources / "experts").state_dict()
    for folder in other_forms:
        model = gpt_model(sources / "experts")
        load_hf_weights(model, folder)
        assert_holds(model.state_dict(), expected)

    # a model that is adapted, inside another
    model = gpt_model(sources / "experts")
    linear = model.decoder.layers[0].self_attention.linear_qkv
    linear.__class__ = type("Adapted", (type(linear),), {})
    linear.lora_A = torch.nn.Parameter(torch.ones(2, 32))
    load_hf_weights(torch.nn.ModuleDict({"inner": model}), sources / "experts")
    assert (linear.lora_A == 1).all()
    assert_holds(model.state_dict(), expected)

    # a user's own rows of the table
    other = Row("decoder.final_layernorm.weight", ("model.layers.0.input_layernorm.weight",))
    model.spare = torch.nn.Parameter(torch.zeros(32))
    load_hf_weights(model, sources / "experts", [*HF_TABLE, other, Row("spare", ("model.norm.weight",))])
    first = model.decoder.layers[0].input_layernorm.weight
    assert torch.equal(model.decoder.final_layernorm.weight, first)
    assert torch.equal(model.spare, expected["decoder.final_layernorm.weight"])


def test_a_fused_norm_of_transformer_engine_is_the_local_one() -> None:
    pairs = {
        "decoder.layers.3.self_attention.linear_qkv.layer_norm_weight": "decoder.layers.3.input_layernorm.weight",
        "decoder.layers.3.mlp.linear_fc1.layer_norm_weight": "decoder.layers.3.pre_mlp_layernorm.weight",
        "decoder.layers.3.mlp.experts.linear_fc2.weight7": "decoder.layers.3.mlp.experts.local_experts.7.linear_fc2.weight",
    }
    for fused, local in pairs.items():
        found, expected = (row_of(name, HF_TABLE, ()) for name in (fused, local))
        assert found is not None
        assert expected is not None
        assert found[1] == expected[1]


def damaged(sources: Path) -> Iterator[tuple[str, dict[str, Tensor], str]]:
    """Return families, tensors that do not fit them, and what is said of them."""
    experts, llama = (load_file(sources / name / "model.safetensors") for name in ("experts", "llama"))
    embedding = "model.embed_tokens.weight"
    short = {**llama, embedding: llama[embedding][:-4].clone()}
    yield "llama", short, r"'model.embed_tokens.weight' is \[96, 32\], and 'embedding.*' takes \[100, 32\]"
    lacking = {key: value for key, value in llama.items() if key != "model.norm.weight"}
    yield "llama", lacking, "lacks 'model.norm.weight', which GPTModel is made of"
    extra = {**llama, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2), "spare": torch.ones(1)}
    yield "llama", extra, "holds 'spare', for which GPTModel has no place"
    three = {k: v[:3].clone() if "mlp.experts" in k else v for k, v in fused_experts(experts).items()}
    yield "experts", three, "'model.layers.0.mlp.experts.*' holds 3 experts, and the model has 4"


@on_ranks(1, 2)
def test_weights_that_do_not_fit_are_said_and_nothing_copied(tmp_path: Path, sources: Path) -> None:
    form_groups()
    for number, (name, tensors, message) in enumerate(damaged(sources)):
        folder = written(tmp_path / f"{number} of rank {rank_of()[0]}", tensors)
        model = gpt_model(sources / name)
        before = {name: p.clone() for name, p in model.named_parameters()}
        with pytest.raises(ValueError, match=message):
            load_hf_weights(model, folder)
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
