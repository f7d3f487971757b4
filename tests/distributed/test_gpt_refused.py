"""What a ``GPTModel`` cannot be: configs, settings, files and bases that are refused, on 1 and 2 gloo ranks."""

from pathlib import Path
from typing import Any

import pytest

from lightning_lora import LoRAConfig, inject, load_peft, save_peft
from lightning_lora.megatron.models import gpt_model
from tests.distributed.gpt import Module, biased, hugging_face, launched, run
from tests.distributed.gpt_families import TINY, form_groups
from tests.distributed.ranks import on_ranks
from tests.distributed.training import rank_of

REFUSED: list[tuple[dict[str, Any], str]] = [
    (
        {"lora": {"use_dora": True}},
        "for which use_dora, lora_bias, PiSSA, OLoRA and init_rng='peft' are not served",
    ),
    ({"lora": {"target_modules": ["q_prj"]}}, "'q_prj' matches no module of GPTModel; nearest: q_proj"),
    ({"lora": {"target_modules": ["output_layer"]}}, "'output_layer' is the output head of a Megatron-core model"),
    (
        {"lora": {"target_modules": ["q_proj"], "fused_pairs": True}},
        "'q_proj' is a part of 'linear_qkv', which fused_pairs=True adapts as one",
    ),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED)
@on_ranks(2)
def test_settings_that_do_not_fit_are_refused(hf: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(None, 2, Module(hf), **settings)


@on_ranks(2)
def test_recomputation_outside_of_autocast_is_refused(hf: Path) -> None:
    message = r"recomputes outside of autocast, in the base's torch.float32 and not in torch.bfloat16"
    with pytest.raises(ValueError, match=message):
        run(None, 2, Module(hf, recompute_granularity="full"), precision="bf16-mixed")


@on_ranks(2)
def test_biases_of_layers_without_adapters_are_refused(tmp_path: Path) -> None:
    if rank_of()[0] == 0:
        biased().save_pretrained(tmp_path)
    message = "bias='all' would not train the bias of 'decoder.layers.0.self_attention.linear_qkv'"
    with pytest.raises(ValueError, match=message):
        run(None, 2, Module(tmp_path), lora={"target_modules": ["o_proj"], "bias": "all"})


@on_ranks(2)
def test_a_file_of_another_rank_is_refused(tmp_path: Path, hf: Path) -> None:
    run(tmp_path, 2, Module(hf))
    message = "has r=4 at 'decoder.layers.0.self_attention.linear_proj', the model has r=2"
    with pytest.raises(ValueError, match=message):
        run(None, 2, Module(hf), ckpt_path=tmp_path / "epoch=0.ckpt", lora={"r": 2})


@pytest.fixture
def of_another_base(tmp_path: Path) -> Path:
    """Return a directory of adapters of another model."""
    save_peft(inject(hugging_face(), LoRAConfig(r=4)), tmp_path)
    return tmp_path


@on_ranks(2)
def test_adapters_of_another_base_are_refused(hf: Path, of_another_base: Path) -> None:
    launched(2)
    with pytest.raises(ValueError, match="was trained on another base model.*holds other values"):
        load_peft(gpt_model(hf), of_another_base)  # whose weights are not loaded


@on_ranks(2)
def test_a_model_that_was_built_before_the_groups_is_refused(hf: Path) -> None:
    from megatron.core import parallel_state

    launched(2)
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(1, create_gloo_process_groups=False)
    module = Module(hf)
    module.configure_model()
    message = r"was built for tensor_parallel_size=1 .*, and runs on \d: build it in configure_model"
    with pytest.raises(ValueError, match=message):
        run(None, 2, module)


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
def test_configs_that_are_not_served_are_said(hf: Path) -> None:
    several = form_groups()
    for settings, message in NOT_SERVED:
        with pytest.raises(ValueError, match=message):
            gpt_model(Config(**settings))
    gpt_model(Config(rope_theta=5e5, rope_scaling=None))  # of an older transformers
    with pytest.raises(TypeError, match="neither .* has 'recompute_granularty'; nearest: recompute_granularity"):
        gpt_model(hf, recompute_granularty="full")
    with pytest.raises(TypeError, match="tensor_model_parallel_size is that of Megatron-core's process groups"):
        gpt_model(hf, tensor_model_parallel_size=4)
    if several:
        with pytest.raises(ValueError, match=r"^vocab_size=101 is not divisible by tensor_model_parallel_size=2$"):
            gpt_model(Config(vocab_size=101))
    else:
        gpt_model(Config(vocab_size=101))


@on_ranks(1, 2)
def test_before_process_groups_it_says_where_to_build(hf: Path) -> None:
    with pytest.raises((ValueError, TypeError), match="build and fill it in configure_model"):
        gpt_model(hf)
