"""GPT-2's ``Conv1D`` with a packed weight, against its dense values, bitsandbytes, transformers and PEFT."""

import copy
import pickle

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from lightning_lora import (
    AdaLoRA,
    LoRAConfig,
    adapter_checkpoint,
    disabled,
    inject,
    load_adapter_state_dict,
    load_peft,
    merge,
    plan,
    quantize,
    remove,
    save_peft,
    unmerge,
)
from lightning_lora.layers.quantized import QuantizedModule, dequantize_parameters, quantize_parameters
from lightning_lora.layers.quantized_linear import QuantizedConv1D
from lightning_lora.model.base_form import quantization_of
from tests import models

KINDS = ["nf4", "nf4-dq", "int8"]
SIZES = [(128, 96), (96, 96), (80, 24), (7, 5)]  # (in, out): the second is square, then blocks over row ends
TOLERANCE = {"rtol": 1e-4, "atol": 1e-6}  # another order of sums
CONFIGS = {
    "lora": {},
    "dropout": {"dropout": 0.3},
    "dora": {"use_dora": True},
    "dora, dropout": {"use_dora": True, "dropout": 0.3},
    "rslora, bias": {"use_rslora": True, "lora_bias": True},
    "pissa": {"init": "pissa"},
    "adalora": {"adalora": AdaLoRA(target_r=2, init_r=4)},
}


def plain(features: tuple[int, int], seed: int = 0) -> Conv1D:
    torch.manual_seed(seed)
    layer = Conv1D(features[1], features[0])
    nn.init.normal_(layer.bias)
    return layer


def packed(kind: str, features: tuple[int, int] = (128, 96), seed: int = 0) -> Conv1D:
    layer = plain(features, seed)
    quantize_parameters(layer, {"weight": kind}, QuantizedConv1D)
    return layer


def gpt2(width: int = 32) -> nn.Module:
    config = GPT2Config(n_embd=width, n_layer=2, n_head=4, vocab_size=models.VOCAB, n_positions=64, bos_token_id=0,
                        eos_token_id=0)  # fmt: skip
    return models._seeded(lambda: GPT2LMHeadModel(config)).eval()


def over_packed(kind: str, **settings) -> nn.Module:
    model = inject(gpt2(), LoRAConfig(**{"r": 4, **settings}), quantize=kind)
    models.fill_adapters(model)
    return model.eval()


def over_same_values(kind: str, **settings) -> nn.Module:
    model = gpt2()
    quantize(model, kind)
    for module in list(model.modules()):
        if isinstance(module, QuantizedModule):
            dequantize_parameters(module)
    inject(model, LoRAConfig(**{"r": 4, **settings}))
    models.fill_adapters(model)
    return model.eval()


def logits(model: nn.Module) -> Tensor:
    return model(input_ids=models.token_ids()).logits


# the layer


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("features", SIZES)
def test_the_weight_reads_in_its_own_layout_and_outputs_and_gradients_are_those_of_it(kind, features):
    layer, x = packed(kind, features), torch.randn(3, 5, features[0], requires_grad=True)
    assert layer.weight.shape == features
    assert (layer.weight - plain(features).weight).norm() < 0.1 * layer.weight.norm()
    expected = x @ layer.weight + layer.bias
    y = layer(x)
    torch.testing.assert_close(y, expected, **TOLERANCE)
    (grad,), (reference,) = (torch.autograd.grad(one.square().sum(), x) for one in (y, expected))
    torch.testing.assert_close(grad, reference, **TOLERANCE)


@pytest.mark.parametrize("kind", KINDS)
def test_codes_are_those_that_bitsandbytes_has_for_the_transpose(kind):
    import bitsandbytes.functional as F

    weight, state = plain((128, 96)).weight.detach().t().contiguous(), packed(kind).state_dict()
    if kind == "int8":
        codes, scales, _ = F.int8_vectorwise_quant(weight.clone())
        assert torch.equal(state["SCB"], scales)
    else:
        codes, _ = F.quantize_4bit(weight, quant_type="nf4")
    assert torch.equal(state["weight"], codes)


@pytest.mark.parametrize("kind", KINDS)
def test_backward_keeps_nothing_dense_adapted_or_not(kind):
    for layer in (packed(kind), inject(nn.Sequential(packed(kind)), LoRAConfig(r=2, target_modules=["0"]))):
        saved: list[int] = []
        x = torch.randn(4, 128, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t.numel()) or t, lambda t: t):
            layer(x)
        assert 128 * 96 not in saved


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("again", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_a_copy_computes_the_same(kind, again):
    layer, x = packed(kind), torch.randn(2, 128)
    assert torch.equal(again(layer)(x), layer(x))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("features", SIZES)
def test_state_dicts_and_plain_weights_load(kind, features):
    layer, other = packed(kind, features, seed=1), packed(kind, features, seed=2)
    with torch.device("meta"):
        empty = packed(kind, features)
    empty.to_empty(device="cpu").load_state_dict(layer.state_dict())
    other.load_state_dict(plain(features, seed=1).state_dict())
    assert torch.equal(empty.weight, layer.weight)
    assert torch.equal(other.weight, layer.weight)
    assert other.origins == layer.origins


def test_a_weight_of_the_transposed_shape_is_refused():
    layer = packed("nf4")
    with pytest.raises((ValueError, RuntimeError), match=r"\[96, 128\]"):
        layer.load_state_dict({"weight": torch.zeros(96, 128), "bias": torch.zeros(96)})


@pytest.mark.parametrize("kind", KINDS)
def test_a_dense_layer_comes_back(kind):
    layer, x = packed(kind), torch.randn(2, 128)
    values, y = layer.weight, layer(x)
    dequantize_parameters(layer)
    assert type(layer) is Conv1D
    assert torch.equal(layer.weight, values)
    torch.testing.assert_close(layer(x), y, **TOLERANCE)


# GPT-2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_adapters_over_it_are_those_over_its_dense_values(kind, config):
    found = []
    for model in (over_packed(kind, **config), over_same_values(kind, **config)):
        torch.manual_seed(3)
        output = logits(model.train() if "dropout" in config else model)
        output.square().mean().backward()
        found.append((output, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-5)  # products in other orders, layer after layer


@pytest.mark.parametrize("kind", KINDS)
def test_a_plan_counts_its_bytes(kind):
    model = gpt2()
    base = plan(model, LoRAConfig(r=4), quantize=kind).quantization
    assert len(base.layers) == 8
    assert base.bytes_before == sum(model.get_submodule(name).weight.nbytes for name in base.layers)
    quantize(model, kind)
    layers = [model.get_submodule(name) for name in base.layers]
    assert all(isinstance(layer, QuantizedConv1D) for layer in layers)
    assert base.bytes_after == sum(getattr(one, part).nbytes for one in layers for part in one.part_names())


def test_one_that_is_left_out_or_adapted_by_its_parameter_stays_plain():
    model = inject(gpt2(), LoRAConfig(r=2, target_modules=["c_attn"], target_parameters=["mlp.c_fc.weight"]),
                   quantize="nf4", quantize_exclude=["attn.c_proj"])  # fmt: skip
    kinds = {name.partition("h.0.")[2]: isinstance(module, QuantizedConv1D) for name, module in model.named_modules()}
    assert [kinds[n] for n in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")] == [True, False, False, True]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config", [CONFIGS["lora"], CONFIGS["dora"], CONFIGS["pissa"]], ids=["lora", "dora", "pissa"])
def test_merged_is_the_trained_function_and_comes_back_bit_for_bit(kind, config):
    model = over_packed(kind, **config)
    expected, before = logits(model), {name: value.clone() for name, value in model.state_dict().items()}
    merge(model)
    assert type(model.transformer.h[0].mlp.c_fc).__bases__[1] is Conv1D
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    unmerge(model)
    assert torch.equal(logits(model), expected)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    torch.testing.assert_close(logits(merge(model, remove=True)), expected, rtol=1e-4, atol=1e-5)
    assert type(model.transformer.h[0].mlp.c_fc) is Conv1D
    assert all(parameter.is_contiguous() for parameter in model.parameters())  # safetensors writes no others


def test_merging_into_the_original_or_requantised(tmp_path):
    gpt2().save_pretrained(tmp_path)
    model, over_float = over_packed("int8"), inject(gpt2(), LoRAConfig(r=4)).eval()
    models.fill_adapters(over_float)
    torch.testing.assert_close(logits(merge(model, base=tmp_path)), logits(over_float), rtol=1e-4, atol=1e-5)
    unmerge(model)
    expected = logits(model)
    dense = merge(copy.deepcopy(model)).transformer.h[1].attn.c_proj.weight  # square
    merge(model, requantize="int8")
    again = model.transformer.h[1].attn.c_proj
    assert isinstance(again, QuantizedConv1D)
    steps = dense.abs().amax(dim=0) / 127  # of each output feature
    assert ((again.weight - dense).abs() <= 0.51 * steps).all()
    torch.testing.assert_close(logits(model), expected, rtol=0.1, atol=0.05)


def test_disabled_and_remove_give_the_quantised_base():
    base = gpt2()
    quantize(base, "nf4")
    expected, model = logits(base), over_packed("nf4")
    with disabled(model):
        assert torch.equal(logits(model), expected)
    assert torch.equal(logits(remove(model)), expected)


def test_the_base_is_known_by_the_values_that_were_packed():
    model = over_packed("nf4-dq")
    file, other = adapter_checkpoint(model), gpt2()
    load_adapter_state_dict(inject(gpt2(), LoRAConfig(r=4)), file)
    with torch.no_grad():
        other.transformer.h[0].attn.c_proj.weight.copy_(other.transformer.h[0].attn.c_proj.weight.t().clone())
    with pytest.raises(ValueError, match="c_proj"):
        load_adapter_state_dict(inject(other, LoRAConfig(r=4), quantize="nf4-dq"), file)


def test_peft_reads_the_directory_over_the_dense_values_and_we_read_it_over_packed_ones(tmp_path):
    model = over_packed("nf4")
    save_peft(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(remove(over_same_values("nf4")), tmp_path)
    torch.testing.assert_close(logits(theirs.eval()), logits(model), rtol=1e-4, atol=1e-5)
    base = gpt2()
    quantize(base, "nf4")
    assert torch.equal(logits(load_peft(base, tmp_path).eval()), logits(model))


@pytest.mark.parametrize("kind", ["nf4", "nf4-dq"])
def test_transformers_reads_the_checkpoint_as_bitsandbytes_layers_and_we_read_it_back(tmp_path, kind):
    model, again = gpt2(64), gpt2(64)  # bitsandbytes' kernel for CPUs is right where rows end with blocks
    decided = quantization_of(quantize(model, kind, exclude=["h.1.mlp.c_fc"]))
    model.save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    kinds = {name: type(theirs.get_submodule(name)).__name__ for name in (*decided.layers, *decided.left_out)}
    assert {name for name, kind in kinds.items() if kind == "Linear4bit"} == set(decided.layers)
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.mul_(2)
    quantize(again, kind, exclude=["h.1.mlp.c_fc"])
    again.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)  # without the tied head
    assert torch.equal(logits(again), logits(model))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own tracing builds one
def test_compiled_under_autocast_and_recomputed_it_gives_the_same():
    model = inject(nn.Sequential(packed("nf4-dq")), LoRAConfig(r=2, target_modules=["0"]))
    models.fill_adapters(model)
    x = torch.randn(3, 128, requires_grad=True)
    expected = [model(x), *torch.autograd.grad(model(x).square().sum(), [x, model[0].lora_A])]
    torch._dynamo.reset()
    for run in (
        torch.compile(model, fullgraph=True, backend="aot_eager"),
        lambda x: checkpoint(model, x, use_reentrant=False),
    ):
        y = run(x)
        found = [y, *torch.autograd.grad(y.square().sum(), [x, model[0].lora_A])]
        torch.testing.assert_close(found, expected, **TOLERANCE)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x).dtype == torch.bfloat16
        torch.testing.assert_close(model(x).float(), expected[0], rtol=0.05, atol=0.05)
