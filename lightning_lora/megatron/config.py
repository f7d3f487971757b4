"""Translate a Hugging Face config into the arguments of Megatron-core's ``TransformerConfig`` and ``GPTModel``."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

# what transformers' config classes say where config.json is silent
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128},
    "qwen3_moe": {"num_key_value_heads": 4, "norm_topk_prob": False, "decoder_sparse_step": 1, "mlp_only_layers": []},
}
LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def read_config(path: str | Path | Any) -> dict[str, Any]:
    """Return a config's fields, with those that its family leaves out."""
    if isinstance(path, str | Path):
        file = Path(path) / "config.json"
        if not file.is_file():
            raise FileNotFoundError(f"{file} is not there: give a local directory with config.json, or the config")
        found = json.loads(file.read_text())
    else:
        found = path.to_dict()
    kind = found.get("model_type")
    if kind not in FAMILIES:
        raise ValueError(f"model_type={kind!r} is not served; served are {', '.join(FAMILIES)}")
    hf: dict[str, Any] = FAMILIES[kind] | found
    heads = hf["num_attention_heads"]
    hf["num_key_value_heads"] = hf.get("num_key_value_heads") or heads
    hf["head_dim"] = hf.get("head_dim") or hf["hidden_size"] // heads
    hf["num_experts"] = hf.get("num_experts") or hf.get("num_local_experts")
    hf["rope"] = {"rope_type": "default", "rope_theta": hf.get("rope_theta", 10000.0)}
    hf["rope"] |= hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    hf["rope"]["rope_type"] = hf["rope"].get("type", hf["rope"]["rope_type"])
    return {name: value for name, value in hf.items() if value is not None}


def refuse_unserved(hf: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` for what the ``GPTModel`` would compute otherwise."""
    kind = hf["model_type"]
    rope = hf["rope"]
    window = hf.get("sliding_window") if kind == "mistral" or hf.get("use_sliding_window") else None
    asked = {
        "hidden_act": (hf.get("hidden_act", "silu"), "silu"),
        "attention_bias": (hf.get("attention_bias", False), False),
        "mlp_bias": (hf.get("mlp_bias", False), False),
        "sliding_window": (window, None),
        "quantization_config": (hf.get("quantization_config"), None),
        "partial_rotary_factor": (rope.get("partial_rotary_factor", hf.get("partial_rotary_factor", 1.0)), 1.0),
    }
    if rope["rope_type"] == "llama3":
        asked |= {name: (float(rope.get(name, value)), float(value)) for name, value in LLAMA3_ROPE.items()}
    elif rope["rope_type"] not in ("default", "linear"):
        raise ValueError(
            f"rope_type={rope['rope_type']!r} of this {kind} is not served: default, linear and llama3 are"
        )
    for name, (found, served) in asked.items():
        if found != served:
            raise ValueError(f"{name}={found!r} of this {kind} is not served: {served!r} is")


def refuse_undivided(hf: Mapping[str, Any], size: int) -> None:
    """Raise ``ValueError`` where tensor-parallel ranks cannot have equal parts."""
    numbers = ["num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size"]
    for name in numbers + ["moe_intermediate_size"] * ("num_experts" in hf):
        if hf[name] % size:
            raise ValueError(f"{name}={hf[name]} is not divisible by tensor_model_parallel_size={size}")


def layer_settings(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of ``TransformerConfig`` that a model's layers come from."""
    settings = {
        "num_layers": hf["num_hidden_layers"],
        "hidden_size": hf["hidden_size"],
        "ffn_hidden_size": hf["intermediate_size"],
        "num_attention_heads": hf["num_attention_heads"],
        "num_query_groups": hf["num_key_value_heads"],
        "kv_channels": hf["head_dim"],
        "normalization": "RMSNorm",
        "layernorm_epsilon": hf.get("rms_norm_eps", 1e-6),
        "qk_layernorm": hf["model_type"].startswith("qwen3"),
        "add_qkv_bias": hf["model_type"] == "qwen2",
        "add_bias_linear": False,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }
    if "num_experts" in hf:
        step, dense = hf["decoder_sparse_step"], hf["mlp_only_layers"]
        settings |= {
            "num_moe_experts": hf["num_experts"],
            "moe_ffn_hidden_size": hf["moe_intermediate_size"],
            "moe_router_topk": hf["num_experts_per_tok"],
            "moe_router_pre_softmax": not hf["norm_topk_prob"],  # Megatron-core normalizes what is left by a softmax
            "moe_router_load_balancing_type": "none",
            "moe_layer_freq": [int((i + 1) % step == 0 and i not in dense) for i in range(hf["num_hidden_layers"])],
        }
    return settings


def model_options(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of ``GPTModel``: vocabulary, positions, and what ties its ends."""
    rope = hf["rope"]
    options = {
        "vocab_size": hf["vocab_size"],
        "max_sequence_length": hf.get("max_position_embeddings", 2048),
        "share_embeddings_and_output_weights": hf.get("tie_word_embeddings", False),
        "position_embedding_type": "rope",
        "rotary_base": rope["rope_theta"],
    }
    if rope["rope_type"] == "llama3":
        options |= {"rope_scaling": True, "rope_scaling_factor": rope["factor"]}
    elif rope["rope_type"] == "linear":
        options["seq_len_interpolation_factor"] = rope["factor"]
    return options
