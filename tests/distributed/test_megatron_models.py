"""``gpt_model`` and ``load_hf_weights`` on 1 and 2 gloo ranks against transformers."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightning_lora.megatron import cpu as megatron_cpu
from lightning_lora.megatron.models import HF_TABLE, Row, block_spec, gpt_model, load_hf_weights
from lightning_lora.megatron.table import row_of
from tests import models
from tests.distributed.ranks import on_ranks
from tests.distributed.training import EXACT, from_all_ranks, rank_of

TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}  # float32 sums in another order
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
BATCH = models.token_ids(2, 8)
LABELS = BATCH.roll(-1, 1)


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


@pytest.fixture(scope="module")
def sources(directory: Path) -> Path:
    """Return the folder in which the weights of every family have a folder."""
    for name in FAMILIES:
        build(name).save_pretrained(directory / name)
    return directory


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


def outputs(model: Any, **inputs: Any) -> Any:
    return model(BATCH, torch.arange(BATCH.shape[1]).expand_as(BATCH), None, **inputs)


def logits_of_transformers(name: str) -> Tensor:
    with torch.no_grad():
        return build(name)(BATCH).logits


@on_ranks(1, 2)
def test_logits_are_those_of_transformers(sources: Path) -> None:
    several = form_groups()
    for name in FAMILIES:
        expected, frequencies = logits_of_transformers(name), build(name).model.rotary_emb.inv_freq
        for parallel in {False, several}:
            model = loaded(sources / name, sequence_parallel=parallel, parallel_output=False).eval()
            with torch.no_grad():
                torch.testing.assert_close(outputs(model), expected, **TOLERANCE)
        # Megatron-core divides positions, where transformers divides frequencies
        scale = 0.25 if name == "linear rope" else 1.0
        torch.testing.assert_close(model.rotary_pos_emb.inv_freq, frequencies / scale)


@on_ranks(1, 2)
def test_dispatchers_of_experts_agree(sources: Path) -> None:
    several = form_groups()
    for dispatcher in ("allgather", "alltoall"):
        settings = {"moe_token_dispatcher_type": dispatcher, "sequence_parallel": several, "parallel_output": False}
        model = loaded(sources / "experts", **settings)  # training, which takes another way through the dispatcher
        torch.testing.assert_close(outputs(model).detach(), logits_of_transformers("experts"), **TOLERANCE)


@on_ranks(1, 2)
def test_norms_and_attention_can_be_others(sources: Path) -> None:
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    class Norm(torch.nn.RMSNorm):
        def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5) -> None:
            super().__init__(hidden_size, eps)

    class Attention(DotProductAttention):
        pass

    form_groups()
    plain = loaded(sources / "experts", parallel_output=False).eval()
    spec = block_spec(plain.config, {WrappedTorchNorm: Norm, DotProductAttention: Attention})
    model = loaded(sources / "experts", parallel_output=False, transformer_layer_spec=spec).eval()
    with torch.no_grad():
        assert torch.equal(outputs(model), outputs(plain))
    kinds = [type(module) for module in model.modules()]
    assert not {torch.nn.RMSNorm, DotProductAttention} & set(kinds)
    # two norms a block, those of queries and keys, and the last one; one attention a block
    assert kinds.count(Norm) == 2 * 4 + 1
    assert kinds.count(Attention) == 2


def gradients_of(model: Any, autocast: bool = False) -> dict[str, Tensor]:
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = outputs(model, labels=LABELS).mean()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@on_ranks(1, 2)
def test_gradients_are_those_of_transformers_and_near_them_under_autocast(sources: Path) -> None:
    form_groups()
    rank, num_ranks = rank_of()
    found = gradients_of(loaded(sources / "llama"))
    model = build("llama")
    torch.nn.functional.cross_entropy(model(BATCH).logits.flatten(0, 1), LABELS.flatten()).backward()
    layer, place = model.model.layers[1], "decoder.layers.1."
    down = layer.mlp.down_proj.weight.grad.chunk(num_ranks, 1)[rank]
    halves = [part.weight.grad.chunk(num_ranks)[rank] for part in (layer.mlp.gate_proj, layer.mlp.up_proj)]
    for name, expected in {
        "decoder.final_layernorm.weight": model.model.norm.weight.grad,
        f"{place}mlp.linear_fc2.weight": down,
        f"{place}mlp.linear_fc1.weight": torch.cat(halves),
    }.items():
        torch.testing.assert_close(found[name], expected, **TOLERANCE)

    for name, rounded in gradients_of(loaded(sources / "llama"), autocast=True).items():
        assert rounded.dtype == torch.float32
        assert (rounded - found[name]).norm() < 0.05 * found[name].norm(), name  # bfloat16 has 8 bits


DROPOUT = {"attention_dropout": 0.2, "hidden_dropout": 0.2}
RECOMPUTED: dict[str, dict[str, Any]] = {
    "full": {"recompute_granularity": "full"},
    "selective": {"recompute_granularity": "selective"},
    "mlp": {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp"]},
}


@pytest.mark.parametrize("name", ["llama", "experts"])
@on_ranks(1, 2)
def test_recomputation_draws_the_same_dropout(sources: Path, name: str) -> None:
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    several = form_groups()

    def seeded_gradients(**settings: Any) -> tuple[dict[str, Tensor], Tensor]:
        """Return the gradients, which are the same only if dropout is drawn again as it was, and what is drawn next."""
        model = loaded(sources / name, sequence_parallel=several, **settings, **DROPOUT)
        model_parallel_cuda_manual_seed(3)
        return gradients_of(model), torch.rand(2)

    expected, after = seeded_gradients()
    for settings in RECOMPUTED.values():
        recomputed, after_recomputation = seeded_gradients(**settings)
        torch.testing.assert_close(recomputed, expected, rtol=1e-5, atol=1e-7)
        assert torch.equal(after_recomputation, after)
    weight = "decoder.layers.1.mlp.linear_fc2.weight"
    if name == "llama":  # dropout changes gradients
        assert (expected[weight] - gradients_of(loaded(sources / name))[weight]).abs().max() > 1e-4


@on_ranks(1, 2)
def test_a_fork_draws_from_its_own_stream() -> None:
    from megatron.core.tensor_parallel import get_cuda_rng_tracker, model_parallel_cuda_manual_seed

    form_groups()
    model_parallel_cuda_manual_seed(5)
    inside, outside = [], [torch.rand(1)]
    for _ in range(2):
        with get_cuda_rng_tracker().fork():
            inside.append(torch.nn.functional.dropout(torch.ones(64), 0.5))
        outside.append(torch.rand(1))
    expected = torch.rand(3, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(torch.cat(outside), expected, **EXACT)
    torch.manual_seed(5 + 2718 + rank_of()[0])
    drawn = [torch.nn.functional.dropout(torch.ones(64), 0.5) for _ in range(2)]
    torch.testing.assert_close(inside, drawn, **EXACT)
    first, *others = from_all_ranks(inside[0])
    assert not any(torch.equal(other, first) for other in others)


@on_ranks(1, 2)
def test_norms_are_marked_under_sequence_parallelism(sources: Path) -> None:
    several = form_groups()
    model = gpt_model(sources / "experts", sequence_parallel=several)
    norms = [parameter for name, parameter in model.named_parameters() if "layernorm" in name]
    assert {bool(getattr(parameter, "sequence_parallel", False)) for parameter in norms} == {several}


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


class Config:
    """What transformers' configs are read by."""

    def __init__(self, **settings: Any) -> None:
        self.values = {"model_type": "llama", **TINY, **settings}

    def to_dict(self) -> dict[str, Any]:
        return self.values


NOT_SERVED: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "gemma2"}, "model_type='gemma2' is not served; served are llama, mistral"),
    ({"model_type": "mistral"}, "sliding_window=4096 of this mistral is not served"),
    ({"hidden_act": "gelu"}, "hidden_act='gelu' of this llama is not served: 'silu' is"),
    ({"attention_bias": True}, "attention_bias=True of this llama is not served"),
    ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_type='yarn' of this llama is not served"),
]


@on_ranks(1, 2)
def test_configs_that_are_not_served_are_said(sources: Path) -> None:
    several = form_groups()
    for settings, message in NOT_SERVED:
        with pytest.raises(ValueError, match=message):
            gpt_model(Config(**settings))
    gpt_model(Config(rope_theta=5e5, rope_scaling=None))  # of an older transformers
    with pytest.raises(TypeError, match="neither .* has 'recompute_granularty'; nearest: recompute_granularity"):
        gpt_model(sources / "llama", recompute_granularty="full")
    with pytest.raises(TypeError, match="tensor_model_parallel_size is that of Megatron-core's process groups"):
        gpt_model(sources / "llama", tensor_model_parallel_size=4)
    if several:
        with pytest.raises(ValueError, match=r"^vocab_size=101 is not divisible by tensor_model_parallel_size=2$"):
            gpt_model(Config(vocab_size=101))
    else:
        gpt_model(Config(vocab_size=101))


@on_ranks(1, 2)
def test_before_process_groups_it_says_where_to_build(sources: Path) -> None:
    with pytest.raises((ValueError, TypeError), match="build and fill it in configure_model"):
        gpt_model(sources / "llama")
