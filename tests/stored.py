"""A small Llama over weights of every stored form, and what the package of each says that its weights are."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_lora import LoRAConfig, inject
from lightning_lora.layers import register_stored_weight
from lightning_lora.model.quantize import quantize
from tests import models

BITSANDBYTES = ["bnb-nf4", "bnb-nf4-dq", "bnb-fp4", "bnb-int8"]
TORCHAO = ["torchao-int8", "torchao-intx", "torchao-float8"]
OURS = ["nf4", "nf4-dq", "int8"]
ALL = [*OURS, *BITSANDBYTES, *TORCHAO, "registered"]


def llama() -> nn.Module:
    """Rows of whole blocks of 64: bitsandbytes' CPU kernel takes other scales where a row ends inside a block."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=models.VOCAB,
        attention_bias=True,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


class Thirds(nn.Linear):
    """A user's own layer: whole numbers of thirds."""

    def __init__(self, dense: nn.Linear) -> None:
        super().__init__(dense.in_features, dense.out_features, dense.bias is not None, device="meta")
        del self.weight
        self.bias = None if dense.bias is None else nn.Parameter(dense.bias.detach().clone())
        self.register_buffer("thirds", (dense.weight.detach() * 300).round().to(torch.int16))

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, ThirdsWeight(self).dense(input.dtype), self.bias)


class ThirdsWeight:
    dtype = torch.float32

    def __init__(self, layer: Any) -> None:
        self.thirds = layer.thirds
        self.shape, self.device = self.thirds.shape, self.thirds.device

    def dense(self, dtype: torch.dtype) -> Tensor:
        return self.thirds.to(dtype) / 300


register_stored_weight(Thirds, ThirdsWeight)


def stored_llama(kind: str) -> nn.Module:
    """Return the model with all linear layers but the head in a stored form; skip where its package is missing."""
    model = llama()
    if kind in OURS:
        quantize(model, kind)  # type: ignore[arg-type]
    elif kind in TORCHAO:
        in_torchao(model, kind)
    else:
        replace(model, Thirds if kind == "registered" else lambda layer: in_bitsandbytes(layer, kind))
    return model


def replace(model: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> None:
    for name, layer in list(model.named_modules()):
        if type(layer) is nn.Linear and name != "lm_head":
            parent, _, local = name.rpartition(".")
            setattr(model.get_submodule(parent), local, make(layer))


def in_bitsandbytes(layer: nn.Linear, kind: str) -> nn.Module:
    layers = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed").nn
    sizes = layer.in_features, layer.out_features, layer.bias is not None
    if kind == "bnb-int8":
        made = layers.Linear8bitLt(*sizes, has_fp16_weights=False)
    else:
        made = layers.Linear4bit(*sizes, quant_type=kind[4:7], compress_statistics=kind.endswith("dq"))
    made.load_state_dict(layer.state_dict())
    return made.requires_grad_(False).to("cpu")


def in_torchao(model: nn.Module, kind: str, config: Any = None) -> None:
    ao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    configs = {
        "torchao-int8": lambda: ao.Int8WeightOnlyConfig(),
        "torchao-intx": lambda: ao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=ao.PerGroup(32)),
        "torchao-float8": lambda: ao.Float8WeightOnlyConfig(),
    }
    ao.quantize_(
        model,
        configs[kind]() if config is None else config,
        filter_fn=lambda m, n: type(m) is nn.Linear and "head" not in n,
    )


def dense_weight(layer: Any, kind: str) -> Tensor:
    """Return the values of a layer's weight, float32, by the functions of its own package."""
    if kind in OURS:
        return layer.weight.detach().float()
    if kind == "registered":
        return layer.thirds.float() / 300
    weight = layer._parameters["weight"]
    if kind in TORCHAO:
        return weight.dequantize().detach().float()
    import bitsandbytes

    if kind == "bnb-int8":
        scales = layer.state.SCB if weight.SCB is None else weight.SCB
        return weight.data.float() * scales[:, None] / 127
    return bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state).float()


def dense_llama(model: nn.Module, kind: str) -> nn.Module:
    """Return a model of plain float32 weights with the values of ``model``'s."""
    dense, layers = llama(), dict(model.named_modules())
    for name, layer in dense.named_modules():
        if isinstance(layer, nn.Linear) and name != "lm_head":
            layer.weight = nn.Parameter(dense_weight(layers[name], kind), requires_grad=False)
    return dense


def adapted(model: nn.Module, **settings: Any) -> nn.Module:
    inject(model, LoRAConfig(**{"r": 4, **settings}))
    models.fill_adapters(model)
    return model.train()
