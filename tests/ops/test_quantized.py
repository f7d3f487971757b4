"""Quantised weights: refused by name where adapters would compute with them, passed over where they would not."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_lora import LoRAConfig, inject, load_peft, merged, named_adapter_parameters, save_peft
from lightning_lora.checkpoint.fingerprint import fingerprint
from tests import models

ATTENTION = LoRAConfig(r=2, target_modules=["q_proj", "v_proj"])


class ScaledInt8(Tensor):
    """What torchao's weights are: integers and a scale that give themselves out as float32, and know few operations."""

    numbers: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, numbers: Tensor, scale: Tensor) -> Any:
        return Tensor._make_wrapper_subclass(cls, numbers.shape, dtype=scale.dtype, device=numbers.device)

    def __init__(self, numbers: Tensor, scale: Tensor) -> None:
        self.numbers, self.scale = numbers, scale

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["numbers", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, tensors: Any, *_: Any) -> Any:
        return cls(tensors["numbers"], tensors["scale"])

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.nn.functional.linear:
            x, weight, *bias = args
            return function(x, weight.numbers * weight.scale, *bias)
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.detach.default:
            return cls(args[0].numbers, args[0].scale)
        raise NotImplementedError(f"{function}")


def quantize(layer: nn.Module, name: str = "weight") -> None:
    weight = layer.get_parameter(name).detach()
    scale = weight.abs().max() / 127
    layer._parameters[name] = nn.Parameter(ScaledInt8((weight / scale).round().to(torch.int8), scale), False)


def as_integers(layer: nn.Module, name: str = "weight") -> None:
    layer._parameters[name] = nn.Parameter((layer.get_parameter(name) * 100).to(torch.int8), False)


QUANTISED = pytest.mark.parametrize(("quantised", "kind"), [(quantize, "ScaledInt8"), (as_integers, "torch.int8")])


def refused(model: nn.Module, config: LoRAConfig, *parts: str) -> None:
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with pytest.raises(ValueError, match="load the base unquantised") as raised:
        inject(model, config)
    for part in parts:
        assert part in str(raised.value)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before


@QUANTISED
def test_a_linear_layer_is_refused_by_name(quantised: Any, kind: str):
    model = models.llama()
    quantised(model.model.layers[1].self_attn.v_proj)
    refused(model, ATTENTION, "'model.layers.1.self_attn.v_proj'", f"its weight is stored as {kind}")


@QUANTISED
@pytest.mark.parametrize(
    ("cls", "sizes", "name"),
    [
        (nn.Conv1d, (4, 4, 1), "weight"),
        (nn.Embedding, (8, 4), "weight"),
        (nn.MultiheadAttention, (8, 2), "in_proj_weight"),
    ],
)
def test_other_kinds_of_layers_are_refused(quantised: Any, kind: str, cls: Any, sizes: tuple[int, ...], name: str):
    layer = cls(*sizes)
    quantised(layer, name)
    refused(nn.Sequential(layer), LoRAConfig(r=2, target_modules=["0"]), "'0'", f"its {name} is stored as {kind}")


@QUANTISED
def test_gpt2s_layers_are_refused(quantised: Any, kind: str):
    model = models.gpt2()
    quantised(model.transformer.h[0].attn.c_attn)
    refused(model, LoRAConfig(r=2, target_modules=["c_attn"]), "'transformer.h.0.attn.c_attn'", kind)


@QUANTISED
def test_parameters_rows_and_modules_that_would_train_are_refused(quantised: Any, kind: str):
    model = models.llama()
    quantised(model.lm_head)
    attention = {"target_modules": ["q_proj"]}
    refused(model, LoRAConfig(target_parameters=["lm_head.weight"], **attention), kind)
    refused(model, LoRAConfig(trainable_token_indices={"lm_head": [1]}, **attention), "'lm_head'", kind)
    refused(model, LoRAConfig(modules_to_save=["lm_head"], **attention), "lm_head.weight", kind)


@QUANTISED
def test_loading_an_adapter_onto_one_is_refused(quantised: Any, kind: str, tmp_path: Path):
    save_peft(inject(models.llama(), ATTENTION), tmp_path)
    model = models.llama()
    quantised(model.model.layers[0].self_attn.q_proj)
    with pytest.raises(ValueError, match="'model.layers.0.self_attn.q_proj' cannot be adapted.*load the base unquant"):
        load_peft(model, tmp_path)


def test_a_class_with_a_forward_of_its_own_is_adapted():
    class Linear8bit(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.weight.float() / 100, self.bias)

    model = nn.Sequential(Linear8bit(8, 8))
    as_integers(model[0])
    inject(model, LoRAConfig(r=2, target_modules=["0"]))
    model(torch.randn(3, 8)).sum().backward()
    assert all(parameter.grad is not None for _, parameter in named_adapter_parameters(model))


def test_quantised_layers_beside_adapted_ones_are_passed_over(tmp_path: Path):
    model = models.llama()
    for block in model.model.layers:
        quantize(block.mlp.down_proj)
    inject(model, ATTENTION)
    models.fill_adapters(model)
    ids = models.token_ids()
    expected = model(ids).logits
    expected.sum().backward()
    assert not [name for name in fingerprint(model)["names"] if "down_proj" in name]
    with merged(model):
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-5)  # one rounding of W + s B A
    save_peft(model, tmp_path)
