"""What a reader of PEFT directories would reject or misread: one broken rule for each directory, and clean ones."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch

from lightning_lora.peft.readers import check_portable
from tests import models

READERS = ("vllm", "sglang", "llama.cpp")
BLOCK = "model.layers.0.self_attn"


def factors(*layers: str, r: int = 4, ranks: dict[str, int] | None = None) -> dict[str, torch.Tensor]:
    ranks = ranks or {}
    a = {f"{layer}.lora_A.weight": torch.ones(ranks.get(layer, r), 8) for layer in layers}
    return a | {f"{layer}.lora_B.weight": torch.ones(8, ranks.get(layer, r)) for layer in layers}


def save(directory: Path, tensors: dict[str, torch.Tensor] | None = None, *, without: str = "", **fields: Any) -> Path:
    """Write an adapter of ``q_proj`` and ``v_proj`` that all readers serve, but for what is given."""
    names = [f"{BLOCK}.q_proj", f"{BLOCK}.v_proj"]
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": "organisation/model",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "v_proj"],
        **fields,
    }
    config.pop(without, None)
    (directory / "adapter_config.json").write_text(json.dumps(config))
    everything = factors(*names) if tensors is None else tensors
    named = {f"base_model.model.{name}": tensor for name, tensor in everything.items()}
    safetensors.torch.save_file(named, directory / "adapter_model.safetensors")
    return directory


def with_tensor(name: str, *shape: int) -> dict[str, torch.Tensor]:
    return factors(f"{BLOCK}.q_proj", f"{BLOCK}.v_proj") | {name: torch.ones(shape or 8)}


def only(directory: Path, reader: str, **options: Any) -> str:
    sentences = check_portable(directory, reader, **options)
    assert len(sentences) == 1, sentences
    return sentences[0]


@pytest.mark.parametrize("reader", READERS)
def test_a_uniform_adapter_is_served_as_peft_means_it(tmp_path: Path, reader: str) -> None:
    assert check_portable(save(tmp_path), reader) == []


@pytest.mark.parametrize("reader", READERS)
def test_a_uniform_adapter_that_peft_wrote_is_clean(tmp_path: Path, reader: str) -> None:
    base = models.llama()
    base.name_or_path = "organisation/model"
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "k_proj", "v_proj", "down_proj"])
    peft.get_peft_model(base, config).save_pretrained(tmp_path, save_embedding_layers=False)

    assert check_portable(tmp_path, reader) == []


@pytest.mark.parametrize("reader", READERS)
def test_a_scale_that_peft_gives_itself_and_the_reader_ignores_is_told_with_both_numbers(
    tmp_path: Path, reader: str
) -> None:
    base = models.llama()
    base.name_or_path = "organisation/model"
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], alpha_pattern={r"layers\.1\.self_attn\.q_proj": 24}
    )
    adapted = peft.get_peft_model(base, config)
    adapted.save_pretrained(tmp_path, save_embedding_layers=False)
    theirs = adapted.base_model.model.model.layers[1].self_attn.q_proj.scaling["default"]

    sentence = only(tmp_path, reader)

    assert f"'model.layers.1.self_attn.q_proj' by {theirs:g} " in sentence
    assert "alpha_pattern" in sentence
    assert "silently by 2." in sentence
    assert "portable=True" in sentence


@pytest.mark.parametrize("reader", READERS)
def test_a_bin_file_is_read_like_safetensors(tmp_path: Path, reader: str) -> None:
    save(tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    torch.save(tensors, tmp_path / "adapter_model.bin")
    (tmp_path / "adapter_model.safetensors").unlink()

    assert check_portable(tmp_path, reader) == []


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    "fields",
    [
        {"rank_pattern": {"o_proj": 16}, "alpha_pattern": {"o_proj": 64}},
        {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"q_proj": 8}},
        {"modules_to_save": None, "bias": "none", "use_dora": False, "layer_replication": None},
        {"lora_dropout": 0.1, "exclude_modules": ["lm_head"], "init_lora_weights": "gaussian"},
    ],
)
def test_fields_that_change_nothing_are_not_told(tmp_path: Path, reader: str, fields: dict[str, Any]) -> None:
    assert check_portable(save(tmp_path, **fields), reader) == []


@pytest.mark.parametrize("reader", READERS)
def test_rslora_of_rank_one_is_plain_lora(tmp_path: Path, reader: str) -> None:
    tensors = factors(f"{BLOCK}.q_proj", f"{BLOCK}.v_proj", r=1)

    assert check_portable(save(tmp_path, tensors, r=1, use_rslora=True), reader) == []


def test_rslora_is_known_to_vllm_alone(tmp_path: Path) -> None:
    save(tmp_path, use_rslora=True)

    assert check_portable(tmp_path, "vllm") == []
    for reader in ("sglang", "llama.cpp"):
        sentence = only(tmp_path, reader)
        assert sentence.startswith("use_rslora:")
        assert "and 1 more layer by 4 " in sentence
        assert "silently by 2." in sentence


def test_a_rank_pattern_is_misread_by_vllm_rejected_by_sglang_and_right_in_llama_cpp(tmp_path: Path) -> None:
    layers = [f"{BLOCK}.q_proj", f"{BLOCK}.v_proj"]
    save(tmp_path, factors(*layers, ranks={layers[0]: 2}), rank_pattern={"q_proj": 2})

    assert "rank_pattern: PEFT scales" in only(tmp_path, "vllm")
    assert "has rank 2 and r=4 (rank_pattern)" in only(tmp_path, "sglang")
    assert check_portable(tmp_path, "llama.cpp") == []


def test_rank_and_alpha_in_proportion_are_right_in_vllm_and_wrong_in_llama_cpp(tmp_path: Path) -> None:
    layers = [f"{BLOCK}.q_proj", f"{BLOCK}.v_proj"]
    tensors = factors(*layers, ranks={layers[0]: 2})
    save(tmp_path, tensors, rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 4})

    assert check_portable(tmp_path, "vllm") == []
    assert "alpha_pattern: PEFT scales" in only(tmp_path, "llama.cpp")


def test_the_first_pattern_in_the_files_order_counts(tmp_path: Path) -> None:
    save(tmp_path, alpha_pattern={"layers.0.self_attn.q_proj": 8, "q_proj": 64})

    assert check_portable(tmp_path, "vllm") == []


def test_an_alpha_of_zero_is_no_alpha_to_llama_cpp(tmp_path: Path) -> None:
    assert "silently by 1." in only(save(tmp_path, lora_alpha=0), "llama.cpp")


def test_a_rank_above_the_servers_names_the_option(tmp_path: Path) -> None:
    save(tmp_path, factors(f"{BLOCK}.q_proj", f"{BLOCK}.v_proj", r=24), r=24)

    assert "max_lora_rank=16" in only(tmp_path, "vllm")
    assert "--max-lora-rank 32" in only(tmp_path, "vllm")
    assert check_portable(tmp_path, "vllm", max_lora_rank=32) == []
    assert check_portable(tmp_path, "sglang") == []
    assert "--max-lora-rank 24" in only(tmp_path, "sglang", max_lora_rank=16)


def test_a_rank_that_no_option_of_vllm_reaches_is_to_be_merged(tmp_path: Path) -> None:
    save(tmp_path, factors(f"{BLOCK}.q_proj", f"{BLOCK}.v_proj", r=600), r=600)

    assert "merge(model, remove=True)" in only(tmp_path, "vllm")


@pytest.mark.parametrize(
    ("reader", "does"), [("vllm", "ValueError"), ("sglang", "silently ignores"), ("llama.cpp", "exits")]
)
def test_a_module_trained_whole_is_served_by_none(tmp_path: Path, reader: str, does: str) -> None:
    save(tmp_path, with_tensor("lm_head.weight", 9, 8), modules_to_save=["lm_head"])

    sentence = only(tmp_path, reader)

    assert "modules_to_save=['lm_head'] with tensor 'lm_head.weight'" in sentence
    assert does in sentence


@pytest.mark.parametrize(
    ("reader", "does"), [("vllm", "NotImplementedError"), ("sglang", "rejects DoRA"), ("llama.cpp", "exits")]
)
def test_dora_is_rejected_by_all(tmp_path: Path, reader: str, does: str) -> None:
    save(tmp_path, with_tensor(f"{BLOCK}.q_proj.lora_magnitude_vector"), use_dora=True)

    assert does in only(tmp_path, reader)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    ("name", "fields"),
    [
        (f"{BLOCK}.q_proj.base_layer.bias", {"bias": "lora_only"}),
        (f"{BLOCK}.q_proj.lora_B.bias", {"lora_bias": True}),
        ("model.embed_tokens.token_adapter.trainable_tokens_delta", {"trainable_token_indices": [1, 2]}),
    ],
)
def test_tensors_that_are_no_factors_are_told(tmp_path: Path, reader: str, name: str, fields: dict[str, Any]) -> None:
    sentence = only(save(tmp_path, with_tensor(name), **fields), reader)

    assert name in sentence
    assert next(iter(fields)) in sentence


def test_a_bias_that_the_config_promises_and_no_layer_has_is_rejected_by_vllm_alone(tmp_path: Path) -> None:
    save(tmp_path, bias="all")

    assert only(tmp_path, "vllm").startswith("bias='all': ")
    assert check_portable(tmp_path, "sglang") == check_portable(tmp_path, "llama.cpp") == []


def test_a_trained_norm_is_lost_in_llama_cpp_at_load(tmp_path: Path) -> None:
    save(tmp_path, with_tensor("model.norm.weight"), modules_to_save=["norm"])

    assert "silently ignores norms" in only(tmp_path, "llama.cpp")


@pytest.mark.parametrize("reader", READERS)
def test_the_copy_of_an_embeddings_base_weight_is_skipped_by_all(tmp_path: Path, reader: str) -> None:
    embedding = {
        "model.embed_tokens.lora_embedding_A": torch.ones(4, 9),
        "model.embed_tokens.lora_embedding_B": torch.ones(8, 4),
        "model.embed_tokens.base_layer.weight": torch.ones(9, 8),
    }

    assert check_portable(save(tmp_path, embedding, target_modules=["embed_tokens"]), reader) == []


def test_the_copy_of_another_base_weight_is_rejected_by_vllm_alone(tmp_path: Path) -> None:
    save(tmp_path, with_tensor(f"{BLOCK}.q_proj.base_layer.weight", 8, 8))

    assert "q_proj.base_layer.weight" in only(tmp_path, "vllm")
    assert check_portable(tmp_path, "llama.cpp") == []


def test_an_adapters_name_in_the_keys_is_known_to_sglang_alone(tmp_path: Path) -> None:
    plain = factors(f"{BLOCK}.q_proj", f"{BLOCK}.v_proj")
    save(tmp_path, {key.replace(".weight", ".default.weight"): value for key, value in plain.items()})

    assert "lora_A.default.weight' and 3 more tensors" in only(tmp_path, "vllm")
    assert "lora_A.default.weight' and 3 more tensors" in only(tmp_path, "llama.cpp")
    assert check_portable(tmp_path, "sglang") == []


def test_fused_experts_are_known_to_vllm_alone(tmp_path: Path) -> None:
    # 3 experts of rank 4
    experts = factors("model.layers.0.mlp.experts.base_layer", "model.layers.0.mlp.experts", r=12)
    save(
        tmp_path,
        factors(f"{BLOCK}.q_proj", f"{BLOCK}.v_proj") | experts,
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )

    assert check_portable(tmp_path, "vllm") == []
    assert "mlp.experts.base_layer' and 1 more layer is" in only(tmp_path, "sglang")
    assert "cannot map it" in only(tmp_path, "llama.cpp")


def test_the_alpha_of_one_fused_parameter_is_misread_by_vllm(tmp_path: Path) -> None:
    save(
        tmp_path,
        factors("model.layers.0.mlp.experts", r=12),
        target_parameters=["mlp.experts.down_proj"],
        alpha_pattern={"experts.down_proj": 16},
    )

    assert "by 4 (lora_alpha=16, r=4" in only(tmp_path, "vllm")


@pytest.mark.parametrize("reader", READERS)
def test_convolutions_are_served_by_none(tmp_path: Path, reader: str) -> None:
    name = "model.layers.0.conv"
    tensors = {f"{name}.lora_A.weight": torch.ones(4, 3, 3, 3), f"{name}.lora_B.weight": torch.ones(8, 4, 1, 1)}

    assert "4 dimensions" in only(save(tmp_path, tensors), reader)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("field", ["use_qalora", "layer_replication", "kasa_config"])
def test_another_layer_than_loras_is_served_by_none(tmp_path: Path, reader: str, field: str) -> None:
    assert only(save(tmp_path, **{field: [[0, 1]]}), reader).startswith(f"{field}=")


def test_invocation_tokens_are_known_to_llama_cpp_alone(tmp_path: Path) -> None:
    save(tmp_path, alora_invocation_tokens=[1, 2])

    assert "every token" in only(tmp_path, "vllm")
    assert "every token" in only(tmp_path, "sglang")
    assert check_portable(tmp_path, "llama.cpp") == []


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("init", ["pissa_niter_4", "olora", "loftq"])
def test_an_adapter_for_a_changed_base_is_told(tmp_path: Path, reader: str, init: str) -> None:
    assert "unchanged" in only(save(tmp_path, init_lora_weights=init), reader)


@pytest.mark.parametrize("reader", READERS)
def test_another_kind_of_adapter_is_told(tmp_path: Path, reader: str) -> None:
    assert only(save(tmp_path, peft_type="LOHA"), reader).startswith("peft_type='LOHA'")


def test_sglang_reads_no_expression_in_target_modules(tmp_path: Path) -> None:
    save(tmp_path, target_modules=r".*\.(q|v)_proj")

    assert "Write the names" in only(tmp_path, "sglang")
    assert check_portable(tmp_path, "vllm") == []


def test_sglang_takes_all_linear(tmp_path: Path) -> None:
    assert check_portable(save(tmp_path, target_modules="all-linear"), "sglang") == []


@pytest.mark.parametrize(("last", "partner"), [("q_proj", "v_proj"), ("v_proj", "q_proj"), ("up_proj", "gate_proj")])
def test_sglang_wants_the_layers_that_it_stacks_together(tmp_path: Path, last: str, partner: str) -> None:
    save(tmp_path, factors(f"model.layers.0.block.{last}"), target_modules=[last])

    assert f"without its {partner}" in only(tmp_path, "sglang")
    assert check_portable(tmp_path, "vllm") == []


def test_sglang_fills_in_a_missing_k_proj_and_up_proj(tmp_path: Path) -> None:
    names = [f"model.layers.0.block.{name}" for name in ("q_proj", "v_proj", "gate_proj", "o_proj")]

    assert check_portable(save(tmp_path, factors(*names)), "sglang") == []


def test_sglang_loses_layers_of_blocks_by_another_name(tmp_path: Path) -> None:
    save(tmp_path, factors("transformer.h.0.attn.c_attn", "transformer.h.1.attn.c_attn"))

    assert "'transformer.h.0.attn.c_attn' and 1 more layer lies in no block" in only(tmp_path, "sglang")


def test_llama_cpp_transposes_the_factors_of_conv1d(tmp_path: Path) -> None:
    save(tmp_path, factors("transformer.h.0.attn.c_attn"), fan_in_fan_out=True)

    assert "transposes the factors" in only(tmp_path, "llama.cpp")
    assert check_portable(tmp_path, "vllm") == []


def test_llama_cpp_asks_for_the_base_model(tmp_path: Path) -> None:
    assert "--base" in only(save(tmp_path, base_model_name_or_path=None), "llama.cpp")


@pytest.mark.parametrize(
    ("reader", "field"),
    [("vllm", "r"), ("sglang", "target_modules"), ("sglang", "peft_type"), ("llama.cpp", "lora_alpha")],
)
def test_a_field_that_the_reader_needs_is_told(tmp_path: Path, reader: str, field: str) -> None:
    tensors = factors(f"{BLOCK}.q_proj", f"{BLOCK}.v_proj", r=8)
    save(tmp_path, tensors, without=field, r=8, lora_alpha=8)

    assert f"lacks {field}: " in only(tmp_path, reader)


def test_an_unknown_reader_is_told_the_three(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"reader='tgi'.*vllm, sglang, llama\.cpp"):
        check_portable(save(tmp_path), "tgi")


def test_a_missing_directory_is_told(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        check_portable(tmp_path / "nowhere", "vllm")


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_file_is_told(tmp_path: Path, name: str) -> None:
    (save(tmp_path) / name).unlink()

    with pytest.raises(FileNotFoundError, match=name):
        check_portable(tmp_path, "vllm")


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"])
def test_a_damaged_file_is_told(tmp_path: Path, name: str) -> None:
    save(tmp_path)
    if name.endswith(".bin"):
        (tmp_path / "adapter_model.safetensors").unlink()
    (tmp_path / name).write_bytes(b"[1, 2")

    with pytest.raises(ValueError, match=name):
        check_portable(tmp_path, "vllm")


@pytest.mark.parametrize("content", ["[]", '{"r": null}', '{"r": 0}', '{"lora_alpha": "much"}'])
def test_a_config_that_is_none_is_told(tmp_path: Path, content: str) -> None:
    (save(tmp_path) / "adapter_config.json").write_text(content)

    with pytest.raises(ValueError, match="adapter_config.json"):
        check_portable(tmp_path, "vllm")


def test_a_factor_without_its_partner_is_damage(tmp_path: Path) -> None:
    save(tmp_path, {f"{BLOCK}.q_proj.lora_A.weight": torch.ones(4, 8)})

    with pytest.raises(ValueError, match="damaged"):
        check_portable(tmp_path, "vllm")
