"""``GPTModel``s that are built from the configs of transformers' families, and transformers' models to compare them with."""

from pathlib import Path
from typing import Any

import torch

from lightning_lora.megatron import cpu as megatron_cpu
from lightning_lora.megatron.models import gpt_model
from lightning_lora.megatron.weights import load_hf_weights
from tests import models

TINY = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 4, "vocab_size": models.VOCAB, "max_position_embeddings": 16384,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama3": ("Llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "linear rope": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "mistral": ("Mistral", {"sliding_window": None, "head_dim": 16}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 8, "tie_word_embeddings": True}),
    "experts": ("Qwen3Moe", {**EXPERTS, "norm_topk_prob": True}),
    "raw experts": ("Qwen3Moe", {**EXPERTS, "norm_topk_prob": False, "mlp_only_layers": [0]}),
}


def build(name: str) -> Any:
    """Return a seeded model of transformers all of whose weights differ, norms' too."""
    import transformers

    family, settings = FAMILIES[name]
    config = getattr(transformers, f"{family}Config")(**{**TINY, **settings})
    model = models._seeded(lambda: getattr(transformers, f"{family}ForCausalLM")(config)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


def form_groups() -> bool:
    """Make Megatron-core's process groups of all ranks; return whether there are several."""
    from megatron.core import parallel_state

    torch.distributed.init_process_group("gloo")
    size = torch.distributed.get_world_size()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=size, create_gloo_process_groups=False)
    megatron_cpu.install()
    megatron_cpu.install()  # a second call does nothing
    return size > 1


def loaded(source: Path, **settings: Any) -> Any:
    model = gpt_model(source, **settings)
    load_hf_weights(model, source)
    return model
