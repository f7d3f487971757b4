"""Merging over bitsandbytes' layers and torchao's weights."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lora import LoRAConfig, inject, merge, merge_receipt, merged, unmerge
from lightning_lora.layers.plain_weight import dense_weight, put_plain, stored_kind, weight_dtype
from tests import models
from tests.stored import stored_llama


@pytest.fixture(autouse=True)
def eager():
    """bitsandbytes compiles kernels for odd shapes."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture
def bitsandbytes():
    return pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")


class Two(nn.Module):
    def __init__(self, make) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = make(64, 128), make(128, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())


def layers(bitsandbytes):
    return {
        "nf4": lambda i, o: bitsandbytes.nn.Linear4bit(i, o, quant_type="nf4", compress_statistics=False),
        "nf4-dq": lambda i, o: bitsandbytes.nn.Linear4bit(i, o, quant_type="nf4", compress_statistics=True),
        "fp4": lambda i, o: bitsandbytes.nn.Linear4bit(i, o, quant_type="fp4", compress_statistics=False),
        "int8": lambda i, o: bitsandbytes.nn.Linear8bitLt(i, o, has_fp16_weights=False),
    }


def adapted(bitsandbytes, kind: str, dtype: torch.dtype = torch.float32, **config) -> nn.Module:
    model = Two(layers(bitsandbytes)[kind]).to(dtype=dtype).to("cpu")
    inject(model, LoRAConfig(**{"r": 4, "target_modules": ["first", "second"], **config}))
    models.fill_adapters(model)
    return model


@pytest.mark.parametrize("config", [{}, {"target_modules": ["first"]}], ids=["all", "one layer"])
@pytest.mark.parametrize("kind", ["nf4", "nf4-dq", "fp4", "int8"])
@torch.no_grad()
def test_bitsandbytes_layers_become_linear_and_come_back(bitsandbytes, kind, config):
    model, x = adapted(bitsandbytes, kind, **config), torch.randn(3, 64)
    expected = model(x)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    merge(model)
    assert all(value.is_floating_point() for value in model.state_dict().values())
    # LLM.int8 rounds a layer's input
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5 if kind != "int8" else 0.02)
    unmerge(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(model(x), expected)
    merge(model, remove=True)
    assert [type(module) for module in model.children()] == [nn.Linear, nn.Linear]


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_dense_values_are_bitsandbytes_own(bitsandbytes, kind):
    layer = layers(bitsandbytes)[kind](64, 128).to("cpu")
    layer.bias.data.zero_()
    expected = layer(torch.eye(64)).T
    torch.testing.assert_close(
        dense_weight(layer, "weight"), expected.float(), rtol=1e-5, atol=1e-3 if kind == "int8" else 0
    )


@pytest.mark.parametrize("kind", ["bnb-nf4", "bnb-int8"])
@torch.no_grad()
def test_a_model_in_another_dtype_than_its_weights_had_is_merged_into_its_own(kind):
    """transformers loads a 4-bit file in another ``dtype`` so: weights, biases and the rest have each one of their own."""
    model = stored_llama(kind).bfloat16()
    biases = {name: p.data.half() for name, p in model.named_parameters() if name.endswith("bias")}
    for name, values in biases.items():
        model.get_parameter(name).data = values.clone()
    inject(model, LoRAConfig(r=4))
    models.fill_adapters(model)
    model.train()  # in eval mode bitsandbytes reorders codes in place on some CPUs
    merge(model)
    assert {parameter.dtype for parameter in model.parameters() if not parameter.requires_grad} == {torch.bfloat16}
    found = model(models.token_ids()).logits
    unmerge(model)
    assert all(torch.equal(model.get_parameter(name), values) for name, values in biases.items())
    torch.testing.assert_close(found, model(models.token_ids()).logits, rtol=0.1, atol=0.02)  # of bfloat16


@torch.no_grad()
def test_codes_that_a_forward_reordered_are_read_in_their_own_order(bitsandbytes):
    model = adapted(bitsandbytes, "nf4", torch.bfloat16).eval()
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    expected = model(x)
    torch.testing.assert_close(merge(model)(x), expected, rtol=0.05, atol=0.05)  # of bfloat16, in two orders of sums


def test_requantising_makes_bitsandbytes_layers_ours(bitsandbytes):
    model = adapted(bitsandbytes, "nf4")
    with torch.no_grad():
        for layer in (model.first, model.second):
            layer.lora_B.mul_(10)
    exact = dense_weight(model.first, "weight") + model.first.lora_scaling * model.first.lora_B @ model.first.lora_A
    expected = bitsandbytes.functional.quantize_4bit(exact.detach(), quant_type="nf4", compress_statistics=False)[0]
    merge(model, remove=True, requantize="nf4")
    assert torch.equal(model.state_dict()["first.weight"], expected)
    assert merge_receipt(model).total.form == "nf4"


def test_save_pretrained_of_a_merged_transformers_model_is_plain(bitsandbytes, tmp_path):
    transformers = pytest.importorskip("transformers")
    models.llama().save_pretrained(tmp_path / "base")
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=config, device_map="cpu", dtype=torch.float32
    )
    inject(model, LoRAConfig(r=4))
    models.fill_adapters(model)
    model.train()  # in eval mode bitsandbytes reorders codes in place on some CPUs, and wants larger matrices there
    with torch.no_grad():
        expected = model(models.token_ids()).logits
    with merged(model):
        model.save_pretrained(tmp_path / "merged")
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(read(models.token_ids()).logits, expected, rtol=1e-3, atol=1e-4)
        assert torch.equal(model(models.token_ids()).logits, expected)
    assert model.config.quantization_config.load_in_4bit
    assert model.is_quantized


def test_torchao_weights_are_read_replaced_and_put_back():
    torchao = pytest.importorskip("torchao", reason="torchao is not installed")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    torch.manual_seed(0)
    layer, x = nn.Linear(64, 128), torch.randn(3, 64)
    quantize_(layer, Int8WeightOnlyConfig())
    expected = layer(x).detach()
    assert torchao is not None
    assert stored_kind(layer, "weight") == type(layer.weight).__name__
    dense = dense_weight(layer, "weight")
    torch.testing.assert_close(F.linear(x, dense, layer.bias), expected, rtol=1e-4, atol=1e-5)
    former = put_plain(layer, "weight", dense.to(weight_dtype(layer, "weight")))
    assert type(layer.weight) is nn.Parameter
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)
    former.put_back()
    assert torch.equal(layer(x), expected)
    assert torch.equal(copy.deepcopy(layer)(x), expected)
