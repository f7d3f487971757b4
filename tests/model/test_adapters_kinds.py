"""Named adapters on every kind of layer, alone and in mixtures, against the same adapter without a name."""

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from lightning_lora import LoRAConfig, active, quantize
from tests import models
from tests.model.test_adapters import (
    alone,
    backward,
    compare_with_each_alone,
    equal,
    gradients,
    run,
    with_adapters,
    within,
)

IDS = models.token_ids(rows=6, columns=5)
NAMES = ["a", "b", None, "a", "b", "b"]


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 4)

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.stack([torch.sin(ids[:, None, :, None] * (i + 1.0) + torch.arange(4.0)) for i in range(3)], 1)[
            :, :, 0
        ]
        return self.head(self.second(self.first(x).tanh()).mean((2, 3)))


def images() -> nn.Module:
    torch.manual_seed(0)
    return Images()


def moe() -> nn.Module:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 16, "num_experts": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_experts_per_tok": 2}
    config = Qwen3MoeConfig(num_hidden_layers=2, vocab_size=models.VOCAB, **sizes, **heads)
    return Qwen3MoeForCausalLM(config)


def quantized(kind: str) -> nn.Module:
    model = models.llama()
    quantize(model, kind)
    return model


LINEAR = {"target_modules": ["q_proj", "v_proj", "down_proj"]}
KINDS = {
    "Conv1D": (models.gpt2, {"target_modules": ["c_attn", "c_fc"]}),
    "embedding": (models.llama, {"target_modules": ["embed_tokens", "q_proj"]}),
    "convolution": (images, {"target_modules": ["first", "second"]}),
    "experts": (moe, {"target_modules": ["q_proj"], "target_parameters": ["gate_up_proj", "down_proj"]}),
    "DoRA": (models.llama, {"use_dora": True, **LINEAR}),
    "DoRA on a convolution": (images, {"use_dora": True, "target_modules": ["first", "second"]}),
    "lora_bias": (models.llama, {"lora_bias": True, **LINEAR}),
    "PiSSA": (models.llama, {"init": "pissa", **LINEAR}),
    "nf4": (lambda: quantized("nf4"), {}),
    "int8": (lambda: quantized("int8"), LINEAR),
}


def configs(kind: str, **more) -> dict[str, LoRAConfig]:
    config = LoRAConfig(r=4, **KINDS[kind][1], **more)
    return {"a": config, "b": dataclasses.replace(config, r=8, alpha=5)}


@pytest.mark.parametrize("kind", KINDS)
def test_a_mixture_equals_each_adapter_alone(kind: str) -> None:
    compare_with_each_alone(KINDS[kind][0](), configs(kind), NAMES, IDS, within(2e-5))


@pytest.mark.parametrize("kind", KINDS)
def test_one_named_adapter_is_bit_for_bit_one_without_a_name(kind: str) -> None:
    base = KINDS[kind][0]()
    model = with_adapters(base, configs(kind))
    for name, config in configs(kind).items():
        single = alone(base, config, model, name)
        with active(model, name):
            y = run(model, IDS)
            backward(y)
        expected = run(single, IDS)
        backward(expected)
        equal(y, expected)
        found, wanted = gradients(model, name), gradients(single)
        assert wanted
        for key in wanted:
            equal(found[key], wanted[key])


def test_kinds_may_differ_between_the_adapters_of_one_layer() -> None:
    named = {"plain": LoRAConfig(r=4), "dora": LoRAConfig(r=2, use_dora=True), "pissa": LoRAConfig(r=4, init="pissa")}
    names = ["plain", "dora", "pissa", None, "dora", "plain"]
    compare_with_each_alone(models.llama(), named, names, IDS, within(2e-5))
