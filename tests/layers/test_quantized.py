"""Quantised linear layers: values, gradients, copies, and state dicts that bitsandbytes and this package share."""

import copy
import io
import itertools
import pickle
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

from lightning_lora.layers.quantized import dequantize_parameters, quantize_parameters
from lightning_lora.layers.quantized_linear import QuantizedLinear

KINDS = ["nf4", "nf4-dq", "int8"]
SIZES = [(128, 96), (80, 24), (7, 5)]  # whole blocks in a row, blocks over row ends, less than a block


def quantized(kind: str, features: tuple[int, int] = (128, 96), *, bias: bool = True, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    layer = nn.Linear(*features, bias=bias)
    quantize_parameters(layer, {"weight": kind}, QuantizedLinear)
    return layer


@pytest.fixture
def bitsandbytes():
    import bitsandbytes  # takes a second

    return bitsandbytes


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("features", SIZES)
def test_outputs_and_gradients_are_those_of_the_dense_weight(kind, features):
    layer, x = quantized(kind, features), torch.randn(3, 5, features[0], requires_grad=True)
    y = layer(x)
    expected = F.linear(x, layer.weight, layer.bias)
    assert torch.equal(y, expected)
    (grad,) = torch.autograd.grad(y.square().sum(), x)
    (reference,) = torch.autograd.grad(expected.square().sum(), x)
    torch.testing.assert_close(grad, reference)


@pytest.mark.parametrize(("kind", "error"), [("nf4", 0.1), ("nf4-dq", 0.1), ("int8", 0.01)])
def test_the_dense_weight_is_near_the_one_that_was_quantised(kind, error):
    torch.manual_seed(0)
    weight = nn.Linear(128, 96).weight
    dense = quantized(kind).weight
    assert (dense - weight).norm() / weight.norm() < error


@pytest.mark.parametrize("kind", KINDS)
def test_backward_keeps_the_packed_bytes_and_nothing_dense(kind):
    layer, saved = quantized(kind), []
    x = torch.randn(4, 128, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        layer(x)
    assert 128 * 96 not in saved


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "duplicate",
    [
        copy.deepcopy,
        copy.copy,
        lambda layer: pickle.loads(pickle.dumps(layer)),
        lambda layer: torch.load(_saved(layer), weights_only=False),
    ],
    ids=["deepcopy", "copy", "pickle", "torch.save"],
)
def test_a_copy_computes_the_same(kind, duplicate):
    layer, x = quantized(kind), torch.randn(2, 128)
    other = duplicate(layer)
    assert type(other) is type(layer)
    assert torch.equal(other(x), layer(x))


def _saved(layer: nn.Module) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return file


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("features", SIZES)
def test_a_state_dict_fills_a_layer_that_was_quantised_on_meta(kind, features):
    layer, x = quantized(kind, features), torch.randn(2, features[0])
    with torch.device("meta"):
        empty = quantized(kind, features)
    empty.to_empty(device="cpu")
    empty.load_state_dict(layer.state_dict())
    assert torch.equal(empty(x), layer(x))


@pytest.mark.parametrize("kind", KINDS)
def test_a_floating_point_weight_is_quantised_as_it_is_loaded(kind):
    layer, other = quantized(kind, seed=1), quantized(kind, seed=2)
    torch.manual_seed(1)
    dense = nn.Linear(128, 96)
    other.load_state_dict(dense.state_dict())
    assert torch.equal(other.weight, layer.weight)


@pytest.mark.parametrize("kind", KINDS)
def test_casts_change_the_dtype_of_values_and_no_byte(kind):
    layer = quantized(kind)
    before = {name: value.clone() for name, value in layer.state_dict().items() if "weight" in name}
    layer.half()
    assert layer.weight.dtype == torch.float16
    assert layer(torch.randn(2, 128, dtype=torch.float16)).dtype == torch.float16
    layer.float()
    after = layer.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_computes_in_its_dtype(kind):
    layer, x = quantized(kind), torch.randn(2, 128)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        expected = F.linear(x, layer.weight, layer.bias)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_dense_layer_comes_back(kind):
    layer, x = quantized(kind), torch.randn(2, 128)
    y = layer(x)
    dequantize_parameters(layer)
    assert type(layer) is nn.Linear
    assert [*layer._parameters] == ["bias", "weight"]
    torch.testing.assert_close(layer(x), y, rtol=0, atol=0)


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: setattr(layer, "weight", nn.Parameter(torch.zeros(96, 128))),
        lambda layer: layer.register_parameter("weight", nn.Parameter(torch.zeros(96, 128))),
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    ],
    ids=["assigned", "registered", "pruned"],
)
def test_another_weight_is_refused_with_what_to_do(change):
    layer, x = quantized("nf4"), torch.randn(2, 128)
    y, names = layer(x), [name for name, _ in layer.named_parameters()]
    with pytest.raises(TypeError, match=r"'weight' of QuantizedLinear is packed as 'nf4'.*load_state_dict"):
        change(layer)
    assert torch.equal(layer(x), y)
    assert [name for name, _ in layer.named_parameters()] == names


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_do_not_train_and_say_so(kind):
    model = copy.deepcopy(nn.Sequential(quantized(kind), nn.Linear(96, 2)))
    for unfreeze in (lambda: model.requires_grad_(True), lambda: setattr(model[0].weight_codes, "requires_grad", True)):
        with pytest.raises(ValueError, match=r"which cannot train: leave its layer out with quantize_exclude="):
            unfreeze()
    model.requires_grad_(False)
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == [
        "0.bias",
        "1.weight",
        "1.bias",
    ]


class TestBitsandbytes:
    """Its layers and ours hold the same bytes under the same keys."""

    def their_layer(self, bitsandbytes, kind, features):
        torch.manual_seed(0)
        dense = nn.Linear(*features)
        layer = bitsandbytes.nn.Linear4bit(
            *features, quant_type="nf4", compress_statistics=kind == "nf4-dq", compute_dtype=torch.float32
        )
        layer.load_state_dict(dense.state_dict())
        return layer.to("cpu")

    @pytest.mark.parametrize("kind", ["nf4", "nf4-dq"])
    def test_the_state_dicts_are_equal(self, bitsandbytes, kind):
        theirs, ours = self.their_layer(bitsandbytes, kind, (128, 96)).state_dict(), quantized(kind).state_dict()
        assert theirs.keys() == ours.keys()
        for name, value in theirs.items():
            if name.endswith("weight.absmax") and kind == "nf4-dq":  # its CPU kernel rounds to the next level at times
                assert (value.int() - ours[name].int()).abs().max() <= 1
            else:
                assert torch.equal(value, ours[name]), name

    @pytest.mark.parametrize("kind", ["nf4", "nf4-dq"])
    def test_ours_reads_theirs_and_computes_the_same(self, bitsandbytes, kind):
        theirs, ours = self.their_layer(bitsandbytes, kind, (128, 96)), quantized(kind, seed=7)
        ours.load_state_dict(theirs.state_dict())
        x = torch.randn(4, 128, requires_grad=True)
        torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=0)

    @pytest.mark.parametrize("kind", ["nf4", "nf4-dq"])
    def test_their_parameter_is_made_of_our_state_dict(self, bitsandbytes, kind):
        ours = quantized(kind)
        state = {name.removeprefix("weight."): value for name, value in ours.state_dict().items()}
        parameter = bitsandbytes.nn.Params4bit.from_prequantized(
            state.pop("weight"), {k: v for k, v in state.items() if k != "bias"}, device="cpu"
        )
        dense = bitsandbytes.functional.dequantize_4bit(parameter.data, parameter.quant_state)
        assert torch.equal(dense, ours.weight)

    def test_int8_codes_and_scales_are_theirs(self, bitsandbytes):
        torch.manual_seed(0)
        weight = nn.Linear(128, 96).weight.detach()
        codes, scales, _ = bitsandbytes.functional.int8_vectorwise_quant(weight.clone())
        state = quantized("int8").state_dict()
        assert torch.equal(state["weight"], codes)
        assert torch.equal(state["SCB"], scales)


class TestRefusals:
    """A state dict that does not fit is refused with what it holds, what was expected and what to do."""

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            (lambda s: s.update(weight=s["weight"][:-1]), "6143 bytes of codes, expected 6144"),
            (lambda s: s.pop("weight.absmax"), "parts have the shapes"),
            (lambda s: s.pop("weight.quant_state.bitsandbytes__nf4"), "no quantisation state"),
            (lambda s: s.update(weight=torch.zeros(96, 128, dtype=torch.int8)), "int8"),
            (lambda s: s.update(weight=torch.zeros(96, 120)), r"\[96, 120\], expected \[96, 128\]"),
            (lambda s: s.update(weight=torch.full((96, 128), float("nan"))), "NaN or infinity"),
        ],
        ids=["short", "no scales", "no state", "int8", "other shape", "NaN"],
    )
    def test_a_damaged_state(self, change, match):
        layer, state = quantized("nf4"), dict(quantized("nf4").state_dict())
        before = layer.weight
        change(state)
        with pytest.raises((ValueError, RuntimeError), match=match):
            layer.load_state_dict(state)
        assert torch.equal(layer.weight, before)

    @pytest.mark.parametrize(
        ("kind", "entry"),
        [("nf4", "weight.absmax"), ("nf4-dq", "weight.nested_absmax"), ("int8", "SCB")],
    )
    def test_scales_without_a_value(self, kind, entry):
        layer, state = quantized(kind), dict(quantized(kind).state_dict())
        before = layer.weight
        state[entry] = state[entry].clone()
        state[entry][-1] = torch.nan
        with pytest.raises(ValueError, match="'weight' holds NaN or infinity"):
            layer.load_state_dict(state)
        assert torch.equal(layer.weight, before)

    @pytest.mark.parametrize(("blocksize", "code"), [(128, "nf4"), (64, "fp4")])
    def test_another_block_size_or_code(self, bitsandbytes, blocksize, code):
        packed, state = bitsandbytes.functional.quantize_4bit(
            torch.randn(96, 128), blocksize=blocksize, quant_type=code
        )
        entries = {f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}
        said = {"blocksize": 128} if blocksize == 128 else {"quant_type": "fp4"}
        match = (
            f"its state says {said}, the model is 'nf4'. No word of quantize= has this form: load the floating-point"
        )
        with pytest.raises(ValueError, match=re.escape(match)):
            quantized("nf4").load_state_dict({"weight": packed, "bias": torch.zeros(96), **entries})

    @pytest.mark.parametrize(("there", "here"), [*itertools.permutations(["nf4", "nf4-dq", "int8"], 2)])
    def test_another_form_is_named_with_the_word_that_fits(self, there, here):
        match = f"the file is '{there}', the model is '{here}'. Quantise the model with quantize='{there}', or load"
        with pytest.raises(ValueError, match=match):
            quantized(here).load_state_dict(quantized(there).state_dict())
