"""One rank of a ``GPTModel`` that is built from a config and filled from safetensors, on CPU."""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_lora.megatron import cpu as megatron_cpu
from lightning_lora.megatron.models import HF_TABLE, Row, block_spec, gpt_model, load_hf_weights
from tests import models
from tests.distributed.launch import report

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
FORMS = ("base", "nested", "fused", "sharded")
DROPOUT = {"attention_dropout": 0.2, "hidden_dropout": 0.2}
RECOMPUTED: dict[str, dict[str, Any]] = {
    "none": {},
    "full": {"recompute_granularity": "full"},
    "selective": {"recompute_granularity": "selective"},
    "mlp": {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp"]},
}
BATCH = models.token_ids(2, 8)


def connect() -> None:
    from megatron.core import parallel_state

    torch.distributed.init_process_group("gloo")
    size = torch.distributed.get_world_size()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=size, create_gloo_process_groups=False)
    megatron_cpu.install()
    megatron_cpu.install()  # a second call does nothing


def loaded(directory: Path, **settings: Any) -> Any:
    model = gpt_model(directory, **settings)
    load_hf_weights(model, directory)
    return model


def outputs(model: Any, **inputs: Any) -> Any:
    return model(BATCH, torch.arange(BATCH.shape[1]).expand_as(BATCH), None, **inputs)


def families(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in FAMILIES:
        for parallel in {False, torch.distributed.get_world_size() > 1}:
            model = loaded(directory / name, sequence_parallel=parallel, parallel_output=False).eval()
            with torch.no_grad():
                found[f"{name}, {parallel}"] = outputs(model).detach()
        found[f"{name} frequencies"] = model.rotary_pos_emb.inv_freq
    for dispatcher in ("allgather", "alltoall"):
        settings = {"moe_token_dispatcher_type": dispatcher, "sequence_parallel": parallel, "parallel_output": False}
        model = loaded(directory / "experts", **settings)  # training, which takes another way through the dispatcher
        found[dispatcher] = outputs(model).detach()
    return found


def exchanged(directory: Path) -> dict[str, Any]:
    """Other norms and another attention in place of Megatron-core's."""
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    class Norm(torch.nn.RMSNorm):
        def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5) -> None:
            super().__init__(hidden_size, eps)

    class Attention(DotProductAttention):
        pass

    plain = loaded(directory / "experts", parallel_output=False).eval()
    spec = block_spec(plain.config, {WrappedTorchNorm: Norm, DotProductAttention: Attention})
    model = loaded(directory / "experts", parallel_output=False, transformer_layer_spec=spec).eval()
    kinds = [type(module) for module in model.modules()]
    with torch.no_grad():
        same = torch.equal(outputs(model), outputs(plain))
    left = [kind for kind in kinds if kind in (torch.nn.RMSNorm, DotProductAttention)]
    # two norms and one attention a block, norms of queries and of keys; the last norm is the block spec's
    return {"same": same, "left": len(left), "norms": kinds.count(Norm), "attentions": kinds.count(Attention)}


def gradients_of(model: Any, autocast: bool = False) -> dict[str, Tensor]:
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = outputs(model, labels=BATCH.roll(-1, 1)).mean()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def recomputation(directory: Path) -> dict[str, Any]:
    """Gradients under dropout, which are the same only if it is drawn again as it was."""
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    found: dict[str, Any] = {}
    parallel = torch.distributed.get_world_size() > 1
    for name in ("llama", "experts"):
        for kind, settings in RECOMPUTED.items():
            model = loaded(directory / name, sequence_parallel=parallel, **settings, **DROPOUT)
            model_parallel_cuda_manual_seed(3)
            found[f"{name}, {kind}"] = gradients_of(model)
            found[f"{name}, {kind}, after"] = torch.rand(2)  # recomputation leaves the stream as the forward did
    found["plain"] = gradients_of(loaded(directory / "llama"))
    found["autocast"] = gradients_of(loaded(directory / "llama"), autocast=True)
    model = gpt_model(directory / "experts", sequence_parallel=parallel)
    marks = [bool(getattr(p, "sequence_parallel", False)) for n, p in model.named_parameters() if "layernorm" in n]
    found["marks"] = (set(marks), parallel)
    return found


def streams(directory: Path) -> dict[str, Any]:
    from megatron.core.tensor_parallel import get_cuda_rng_tracker, model_parallel_cuda_manual_seed

    before = torch.rand(1, generator=torch.Generator().manual_seed(5))
    model_parallel_cuda_manual_seed(5)
    tracker, inside = get_cuda_rng_tracker(), []
    outside = [torch.rand(1)]
    for _ in range(2):
        with tracker.fork():
            inside.append(torch.nn.functional.dropout(torch.ones(64), 0.5))
        outside.append(torch.rand(1))
    expected = torch.rand(3, generator=torch.Generator().manual_seed(5))
    with torch.random.fork_rng():
        torch.manual_seed(5 + 2718 + int(os.environ["RANK"]))
        drawn = [torch.nn.functional.dropout(torch.ones(64), 0.5) for _ in range(2)]
    return {"outside": (torch.cat(outside), expected), "inside": (inside, drawn), "first": (outside[0], before)}


def forms(directory: Path) -> dict[str, Any]:
    """The same weights under other names, in other files, and into models that are adapted or stand in larger ones."""
    found: dict[str, Any] = {}
    expected = loaded(directory / "experts").state_dict()
    for form in FORMS:
        model = gpt_model(directory / "experts")
        load_hf_weights(model, directory / form)
        found[form] = same(model.state_dict(), expected)
    model = gpt_model(directory / "experts")
    linear = model.decoder.layers[0].self_attention.linear_qkv
    linear.__class__ = type("Adapted", (type(linear),), {})
    linear.lora_A = torch.nn.Parameter(torch.ones(2, 32))
    load_hf_weights(torch.nn.ModuleDict({"inner": model}), directory / "experts")
    state = model.state_dict()
    found["adapted"] = bool((state.pop("decoder.layers.0.self_attention.linear_qkv.lora_A") == 1).all())
    found["inner"] = same(state, expected)
    other = [Row("decoder.final_layernorm.weight", ("model.layers.0.input_layernorm.weight",))]
    spare = [Row("spare", ("model.norm.weight",))]
    model.spare = torch.nn.Parameter(torch.zeros(32))
    load_hf_weights(model, directory / "experts", [*HF_TABLE, *other, *spare])
    first = model.decoder.layers[0].input_layernorm.weight
    norm = expected["decoder.final_layernorm.weight"]
    found["own rows"] = torch.equal(model.decoder.final_layernorm.weight, first) and torch.equal(model.spare, norm)
    return found


def same(state: dict[str, Any], expected: dict[str, Any]) -> bool:
    tensors = {name for name, value in expected.items() if isinstance(value, Tensor)}
    return all(torch.equal(state[name], expected[name]) for name in tensors)


def refused(call: Any) -> str | None:
    try:
        call()
    except (ValueError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def refusals(directory: Path) -> dict[str, Any]:
    llama = directory / "llama"
    found: dict[str, Any] = {}
    for case in ("wrong shape", "missing", "extra", "missing expert"):
        model = gpt_model(directory / ("experts" if case == "missing expert" else "llama"))
        before = {name: p.clone() for name, p in model.named_parameters()}
        found[case] = refused(lambda case=case, model=model: load_hf_weights(model, directory / case))
        found[f"{case} copied"] = not all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    config: dict[str, Any] = {"model_type": "llama", **TINY}
    windowed = {**config, "model_type": "mistral"}
    cases: dict[str, dict[str, Any]] = {
        "gemma": {**config, "model_type": "gemma2"},
        "window": windowed,
        "gelu": {**config, "hidden_act": "gelu"},
        "bias": {**config, "attention_bias": True},
        "yarn": {**config, "rope_scaling": {"type": "yarn", "factor": 4.0}},
        "vocabulary": {**config, "vocab_size": 101},
    }
    for name, case in cases.items():
        found[name] = refused(lambda case=case: gpt_model(Config(case)))
    found["older"] = refused(lambda: gpt_model(Config({**config, "rope_theta": 5e5, "rope_scaling": None})))
    found["override"] = refused(lambda: gpt_model(llama, recompute_granularty="full"))
    found["size"] = refused(lambda: gpt_model(llama, tensor_model_parallel_size=4))
    return found


class Config:
    """What transformers' configs are read by."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values

    def to_dict(self) -> dict[str, Any]:
        return self.values


def main(directory: Path) -> None:
    too_early = refused(lambda: gpt_model(directory / "llama"))
    connect()
    parts = (families, exchanged, recomputation, streams, forms, refusals)
    report(directory, {"too early": too_early, **{part.__name__: part(directory) for part in parts}})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
