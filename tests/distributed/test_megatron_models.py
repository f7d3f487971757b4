"""``gpt_model`` and ``load_hf_weights`` on 1 and 2 gloo ranks against transformers."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_lora.megatron.models import HF_TABLE
from lightning_lora.megatron.table import row_of
from tests import models
from tests.distributed.launch import launch
from tests.distributed.megatron_models_script import BATCH, FAMILIES, FORMS, RECOMPUTED, TINY

TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}  # float32 sums in another order


def build(name: str) -> Any:
    """Return a seeded model all of whose weights differ, norms' too."""
    import transformers

    family, settings = FAMILIES[name]
    config = getattr(transformers, f"{family}Config")(**{**TINY, **settings})
    model = models._seeded(lambda: getattr(transformers, f"{family}ForCausalLM")(config)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


def save_other_forms(directory: Path) -> None:
    """Save what ``experts`` and ``llama`` hold under other names, and damaged."""
    experts, llama = (load_file(directory / name / "model.safetensors") for name in ("experts", "llama"))
    fused = {key: value for key, value in experts.items() if ".experts." not in key}
    for layer in range(2):
        place = f"model.layers.{layer}.mlp.experts"
        gate, up, down = (
            torch.stack([experts[f"{place}.{expert}.{part}_proj.weight"] for expert in range(4)])
            for part in ("gate", "up", "down")
        )
        fused |= {f"{place}.gate_up_proj": torch.cat([gate, up], 1), f"{place}.down_proj": down}
    short = {key: value[:3].clone() if "mlp.experts" in key else value for key, value in fused.items()}
    norm, embedding = "model.norm.weight", "model.embed_tokens.weight"
    forms = {
        "base": {key.removeprefix("model."): value for key, value in experts.items()},
        "nested": {f"base_model.model.{key}": value for key, value in experts.items()},
        "fused": fused,
        "missing expert": short,
        "wrong shape": {**llama, embedding: llama[embedding][:-4].clone()},
        "missing": {key: value for key, value in llama.items() if key != norm},
        "extra": {**llama, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2), "spare": torch.ones(1)},
    }
    for form, tensors in forms.items():
        (directory / form).mkdir()
        save_file(tensors, directory / form / "model.safetensors")
    (directory / "sharded").mkdir()
    parts = {f"part{index}.safetensors": dict(list(experts.items())[index::2]) for index in range(2)}
    for file, tensors in parts.items():
        save_file(tensors, directory / "sharded" / file)
    weight_map = {key: file for file, tensors in parts.items() for key in tensors}
    (directory / "sharded" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    directory = tmp_path_factory.mktemp("references")
    built = {name: build(name) for name in FAMILIES}
    for name, model in built.items():
        model.save_pretrained(directory / name)
    save_other_forms(directory)
    return directory, built


@pytest.fixture(scope="module", params=[1, 2])
def ranks(request: pytest.FixtureRequest, references: tuple[Path, dict[str, Any]]) -> list[Any]:
    return launch("megatron_models_script.py", request.param, references[0])


class TestModels:
    @pytest.mark.parametrize("name", FAMILIES)
    def test_logits_are_those_of_transformers(self, ranks: list[Any], references: Any, name: str) -> None:
        with torch.no_grad():
            expected = references[1][name](BATCH).logits
        for rank in ranks:
            for parallel in {False, len(ranks) > 1}:
                torch.testing.assert_close(rank["families"][f"{name}, {parallel}"], expected, **TOLERANCE)
            frequencies = references[1][name].model.rotary_emb.inv_freq
            torch.testing.assert_close(rank["families"][f"{name} frequencies"], frequencies / scale(name))

    def test_dispatchers_of_experts_agree(self, ranks: list[Any], references: Any) -> None:
        with torch.no_grad():
            expected = references[1]["experts"](BATCH).logits
        for rank in ranks:
            for dispatcher in ("allgather", "alltoall"):
                torch.testing.assert_close(rank["families"][dispatcher], expected, **TOLERANCE)

    def test_gradients_are_those_of_transformers(self, ranks: list[Any], references: Any) -> None:
        model = build("llama")
        logits = model(BATCH).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), BATCH.roll(-1, 1).flatten()).backward()
        for index, rank in enumerate(ranks):
            found = rank["recomputation"]["plain"]
            layer, place = model.model.layers[1], "decoder.layers.1."
            torch.testing.assert_close(
                found["decoder.final_layernorm.weight"], model.model.norm.weight.grad, **TOLERANCE
            )
            down = layer.mlp.down_proj.weight.grad.chunk(len(ranks), 1)[index]
            torch.testing.assert_close(found[f"{place}mlp.linear_fc2.weight"], down, **TOLERANCE)
            halves = [part.weight.grad.chunk(len(ranks))[index] for part in (layer.mlp.gate_proj, layer.mlp.up_proj)]
            torch.testing.assert_close(found[f"{place}mlp.linear_fc1.weight"], torch.cat(halves), **TOLERANCE)


def scale(name: str) -> float:
    """Return what Megatron-core divides positions by, where transformers divides frequencies."""
    return 0.25 if name == "linear rope" else 1.0


class TestOnCPU:
    @pytest.mark.parametrize("name", ["llama", "experts"])
    @pytest.mark.parametrize("kind", [kind for kind in RECOMPUTED if kind != "none"])
    def test_recomputation_draws_the_same_dropout(self, ranks: list[Any], name: str, kind: str) -> None:
        for rank in ranks:
            found, expected = (rank["recomputation"][f"{name}, {one}"] for one in (kind, "none"))
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
            after = [rank["recomputation"][f"{name}, {one}, after"] for one in (kind, "none")]
            assert torch.equal(*after)

    def test_dropout_changes_gradients(self, ranks: list[Any]) -> None:
        for rank in ranks:
            name = "decoder.layers.1.mlp.linear_fc2.weight"
            dropped, plain = (rank["recomputation"][one][name] for one in ("llama, none", "plain"))
            assert (dropped - plain).abs().max() > 1e-4

    def test_autocast_reaches_the_backward(self, ranks: list[Any]) -> None:
        for rank in ranks:
            for name, plain in rank["recomputation"]["plain"].items():
                found = rank["recomputation"]["autocast"][name]
                assert found.dtype == torch.float32
                assert (found - plain).norm() < 0.05 * plain.norm(), name  # bfloat16 has 8 bits

    def test_a_fork_draws_from_its_own_stream(self, ranks: list[Any]) -> None:
        for rank in ranks:
            for found, expected in rank["streams"].values():
                torch.testing.assert_close(found, expected, rtol=0.0, atol=0.0)
        inside = [rank["streams"]["inside"][0][0] for rank in ranks]
        assert len(ranks) == 1 or not torch.equal(*inside)

    def test_norms_are_marked_under_sequence_parallelism(self, ranks: list[Any]) -> None:
        for rank in ranks:
            marks, parallel = rank["recomputation"]["marks"]
            assert marks == {parallel}

    def test_norms_and_attention_can_be_others(self, ranks: list[Any]) -> None:
        for rank in ranks:
            # two norms a block, those of queries and keys, and the last one
            assert rank["exchanged"] == {"same": True, "left": 0, "norms": 2 * 4 + 1, "attentions": 2}


class TestWeights:
    @pytest.mark.parametrize("form", [*FORMS, "inner", "adapted", "own rows"])
    def test_other_files_and_models_are_filled_alike(self, ranks: list[Any], form: str) -> None:
        assert all(rank["forms"][form] for rank in ranks)

    def test_a_fused_norm_of_transformer_engine_is_the_local_one(self) -> None:
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


class TestRefusals:
    @pytest.mark.parametrize(
        ("case", "message"),
        [
            ("wrong shape", r"'model.embed_tokens.weight' is \[96, 32\], and 'embedding.*' takes \[100, 32\]"),
            ("missing", "lacks 'model.norm.weight', which GPTModel is made of"),
            ("extra", "holds 'spare', for which GPTModel has no place"),
            ("missing expert", "'model.layers.0.mlp.experts.*' holds 3 experts, and the model has 4"),
        ],
    )
    def test_what_does_not_fit_is_said_and_nothing_copied(self, ranks: list[Any], case: str, message: str) -> None:
        for rank in ranks:
            assert re.search(message, rank["refusals"][case]), rank["refusals"][case]
            assert not rank["refusals"][f"{case} copied"]

    @pytest.mark.parametrize(
        ("case", "message"),
        [
            ("gemma", "model_type='gemma2' is not served; served are llama, mistral"),
            ("window", "sliding_window=4096 of this mistral is not served"),
            ("gelu", "hidden_act='gelu' of this llama is not served: 'silu' is"),
            ("bias", "attention_bias=True of this llama is not served"),
            ("yarn", "rope_type='yarn' of this llama is not served"),
            ("override", "TypeError: neither .* has 'recompute_granularty'; nearest: recompute_granularity"),
            ("size", "TypeError: tensor_model_parallel_size is that of Megatron-core's process groups"),
        ],
    )
    def test_what_is_not_served_is_said(self, ranks: list[Any], case: str, message: str) -> None:
        for rank in ranks:
            assert re.search(message, rank["refusals"][case]), rank["refusals"][case]

    def test_configs_of_older_transformers_are_read(self, ranks: list[Any]) -> None:
        assert [rank["refusals"]["older"] for rank in ranks] == [None] * len(ranks)

    def test_a_vocabulary_that_ranks_do_not_divide_is_said(self, ranks: list[Any]) -> None:
        message = "ValueError: vocab_size=101 is not divisible by tensor_model_parallel_size=2"
        assert [rank["refusals"]["vocabulary"] for rank in ranks] == [message if len(ranks) > 1 else None] * len(ranks)

    def test_before_process_groups_it_says_where_to_build(self, ranks: list[Any]) -> None:
        assert all(re.search("build and fill it in configure_model", rank["too early"]) for rank in ranks)
