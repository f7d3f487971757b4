"""4-bit checkpoints of transformers and bitsandbytes: they read ours, and ours reads theirs."""

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from lightning_lora import LoRAConfig, disabled, inject, quantize
from tests import models
from tests.model.small import run

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
KINDS = ["nf4", "nf4-dq", "int8"]


def llama() -> Any:
    """Return a Llama whose rows are whole blocks: where one ends inside a block, bitsandbytes' CPU kernel is wrong."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=models.VOCAB)).eval()


def theirs(directory: Path, **settings: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, device_map="cpu", **settings).eval()


def quantized_by_them(directory: Path, kind: str) -> Any:
    from transformers import BitsAndBytesConfig

    llama().save_pretrained(directory / "float")
    in_4_bit = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": kind == "nf4-dq"}
    settings = {"load_in_8bit": True} if kind == "int8" else in_4_bit
    return theirs(directory / "float", quantization_config=BitsAndBytesConfig(**settings))


def assert_same_function(their_model: Any, ours: Any, kind: str) -> None:
    """Compare bytes, and logits; with int8 bitsandbytes rounds activations too, to a 127th of their largest."""
    state, own = their_model.state_dict(), ours.state_dict()
    for name in ("model.layers.1.mlp.up_proj.weight", "model.layers.0.self_attn.k_proj.weight"):
        assert torch.equal(state[name], own[name])
    tolerance = {"rtol": 0, "atol": 2e-2} if kind == "int8" else {"rtol": 1.3e-6, "atol": 1e-5}
    torch.testing.assert_close(run(their_model), run(ours), **tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_from_pretrained_reads_what_a_quantised_model_writes(tmp_path: Path, kind: str) -> None:
    model = llama()
    quantize(model, kind)
    model.save_pretrained(tmp_path)
    assert not hasattr(model.config, "quantization_config")
    read = theirs(tmp_path)
    assert type(read.model.layers[0].mlp.up_proj).__module__.startswith("bitsandbytes")
    assert_same_function(read, model, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_model_reads_what_transformers_wrote(tmp_path: Path, kind: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    other = quantized_by_them(tmp_path, kind)
    other.save_pretrained(tmp_path / "packed")
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path / "packed")).eval()
    quantize(model, kind)
    model.load_state_dict(safetensors.torch.load_file(tmp_path / "packed" / "model.safetensors"))
    assert_same_function(other, model, kind)


def test_their_model_is_adapted_as_it_is_and_not_quantised_again(tmp_path: Path) -> None:
    model = quantized_by_them(tmp_path, "nf4")
    with pytest.raises(ValueError, match="transformers' quantization_config .*leave quantize= out"):
        inject(model, LoRAConfig(r=2), quantize="nf4")
    inject(model, LoRAConfig(r=2))


def test_an_adapted_model_is_refused_as_over_a_float_base(tmp_path: Path) -> None:
    model = inject(models.llama(), LoRAConfig(r=2), quantize="nf4")
    with pytest.raises(ValueError, match="save_peft"):
        model.save_pretrained(tmp_path)


def test_inside_disabled_the_quantised_base_is_written(tmp_path: Path) -> None:
    model = inject(llama(), LoRAConfig(r=2), quantize="nf4-dq", quantize_exclude=["o_proj"])
    models.fill_adapters(model)
    with disabled(model):
        model.save_pretrained(tmp_path)
        expected = run(model)
    torch.testing.assert_close(run(theirs(tmp_path)), expected)
