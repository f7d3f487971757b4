"""``quantize=``: what it packs and leaves, with which bytes, when it is refused, and that it is the same at any time."""

import copy
import pickle

import pytest
import torch
from torch import nn

from lightning_lora import LoRAConfig, Plan, apply, disabled, inject, plan, quantize, remove
from lightning_lora.layers.quantized_linear import QuantizedLinear
from lightning_lora.layers.quantized_model import num_parameters
from lightning_lora.model.base_form import quantization_of
from lightning_lora.model.quantize import plan_quantization
from tests import models
from tests.model.small import run
from tests.models import fill_adapters

KINDS = ["nf4", "nf4-dq", "int8"]
CONFIG = LoRAConfig(r=4)


def packed_names(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


def on_meta(config) -> nn.Module:
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        return LlamaForCausalLM(config)


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapted_quantised_model_is_the_adapter_over_its_dense_values(kind):
    model = inject(models.llama(), CONFIG, quantize=kind)
    fill_adapters(model)
    dense = models.llama()
    dense.load_state_dict({n: _value(model, n) for n in dense.state_dict()})
    inject(dense, CONFIG)
    fill_adapters(dense)
    outputs = [run(one) for one in (model, dense)]
    torch.testing.assert_close(*outputs)
    gradients = []
    for one, output in zip((model, dense), outputs, strict=True):
        output.square().mean().backward()
        gradients.append({n: p.grad for n, p in one.named_parameters() if p.grad is not None})
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)  # other order of sums


def _value(model: nn.Module, name: str) -> torch.Tensor:
    owner, _, local = name.rpartition(".")
    return getattr(model.get_submodule(owner), local).detach()


@pytest.mark.parametrize("kind", KINDS)
def test_disabled_and_remove_give_the_quantised_base(kind):
    base = models.llama()
    quantize(base, kind)
    expected = run(base)
    model = inject(models.llama(), CONFIG, quantize=kind)
    fill_adapters(model)
    with disabled(model):
        assert torch.equal(run(model), expected)
    assert torch.equal(run(remove(model)), expected)
    assert packed_names(model) == packed_names(base)


def test_what_it_leaves_as_it_is_and_says():
    model = models.llama()
    decided = plan_quantization(model, "nf4", exclude=["o_proj"])
    assert quantize(model, "nf4", exclude=["o_proj"]) is model
    assert decided == quantization_of(model)
    assert decided.left_out == {f"model.layers.{i}.self_attn.o_proj": "excluded" for i in (0, 1)} | {
        "lm_head": "output head"
    }
    assert packed_names(model) == set(decided.layers)
    assert f"nf4: 12 linear layers, {decided.bytes_before / 1e3:.1f} -> {decided.bytes_after / 1e3:.1f} kB" in str(
        decided
    )
    assert "lm_head (output head)" in str(decided)


@pytest.mark.parametrize(
    ("settings", "whole"),
    [
        ({"modules_to_save": ["up_proj"], "exclude_modules": ["up_proj"]}, "up_proj"),
        ({"target_parameters": ["q_proj.weight"], "target_modules": ["k_proj"]}, "q_proj"),
        ({"trainable_token_indices": {"lm_head": [1, 2]}}, "lm_head"),
    ],
)
def test_what_trains_whole_or_by_itself_is_not_packed(settings, whole):
    model = inject(models.llama(), LoRAConfig(r=2, **settings), quantize="nf4")
    assert not any(name.endswith(whole) for name in packed_names(model))
    assert packed_names(model)
    run(model).square().mean().backward()


def test_new_heads_are_not_packed():
    model = inject(models.bert_classifier(), CONFIG, quantize="nf4")
    assert "classifier" not in packed_names(model)
    assert model.classifier.weight.requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_a_plan_says_the_bytes_that_are_there_afterwards(kind):
    model = models.llama()
    decided = plan(model, CONFIG, quantize=kind)
    assert not packed_names(model)
    assert f"base in {kind}" in str(decided)
    base = decided.quantization
    weights = sum(model.get_submodule(name).weight.numel() for name in base.layers)
    assert base.bytes_before == 4 * weights
    apply(decided)
    parts = [getattr(m, name) for m in map(model.get_submodule, base.layers) for name in m.part_names()]
    assert base.bytes_after == sum(part.numel() for part in parts)


def test_packed_weights_count_as_the_weights_that_they_stand_for():
    model = models.llama()
    expected = sum(parameter.numel() for parameter in model.parameters())
    quantize(model, "nf4-dq")
    assert num_parameters(model) == expected
    assert plan(model, CONFIG).num_base == expected


def test_a_plan_is_refused_for_a_model_that_was_quantised_since():
    model = models.llama()
    decided = plan(model, CONFIG, quantize="nf4")
    quantize(model, "int8")
    with pytest.raises(ValueError, match="quantize='int8'"):
        apply(decided)


@pytest.mark.parametrize("shape", ["SmolLM2-135M", "Llama-3.1-8B"])
def test_a_base_in_4_bits_takes_less_than_028_of_bfloat16(shape):
    from transformers import LlamaConfig

    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    small, large = (576, 1536, 30, 9, 3), (4096, 14336, 32, 32, 8)
    sizes = dict(zip(names, small if shape == "SmolLM2-135M" else large, strict=True))
    model = on_meta(LlamaConfig(**sizes)).to(torch.bfloat16)
    decided = plan(model, CONFIG, quantize="nf4-dq").quantization
    assert len(decided.layers) == 7 * sizes["num_hidden_layers"]
    assert decided.bytes_before == 2 * sum(model.get_submodule(n).weight.numel() for n in decided.layers)
    quantize(model, "nf4-dq")
    held = sum(getattr(model.get_submodule(n), part).nbytes for n in decided.layers
               for part in model.get_submodule(n).part_names())  # fmt: skip
    assert held == decided.bytes_after
    assert held / decided.bytes_before < 0.28


class TestAgain:
    """The same words over a model that is quantised are fine; others are an error."""

    @pytest.mark.parametrize("first", [lambda m: quantize(m, "nf4"), lambda m: inject(m, CONFIG, quantize="nf4")])
    def test_the_same_form_changes_nothing(self, first):
        model = models.llama()
        first(model)
        expected = {name: value.clone() for name, value in model.state_dict().items() if "lora" not in name}
        for _ in range(2):
            inject(model, CONFIG, quantize="nf4")
        after = model.state_dict()
        assert all(torch.equal(value, after[name]) for name, value in expected.items())

    def test_it_outlives_remove_copies_and_pickles(self):
        model = inject(models.llama(), CONFIG, quantize="nf4")
        for other in (remove(copy.deepcopy(model)), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            inject(other, CONFIG, quantize="nf4")
            assert torch.equal(run(other), run(model))

    @pytest.mark.parametrize("adapted", [False, True])
    @pytest.mark.parametrize("other", [{"quantize": "int8"}, {"quantize": "nf4", "quantize_exclude": ["q_proj"]}])
    def test_another_form_is_refused(self, adapted, other):
        model = models.llama()
        quantize(model, "nf4")
        if adapted:
            inject(model, CONFIG)
        with pytest.raises(ValueError, match=r"quantize='nf4'.*build the base anew"):
            inject(model, CONFIG, **other)

    def test_after_inject_is_refused(self):
        model = inject(models.llama(), CONFIG)
        with pytest.raises(ValueError, match=r"call remove\(model\) first"):
            inject(model, CONFIG, quantize="nf4")
        with pytest.raises(ValueError, match="is adapted"):
            quantize(model, "nf4")
        inject(remove(model), CONFIG, quantize="nf4")

    @pytest.mark.parametrize("adapted", [False, True])
    def test_by_hand_the_same_form_changes_nothing_and_another_is_refused(self, adapted):
        model = quantize(models.llama(), "nf4", exclude=("q_proj",))
        if adapted:
            inject(model, CONFIG)
        expected = run(model)
        assert quantize(model, "nf4", exclude=["q_proj"]) is model
        for kind, exclude in (("nf4-dq", ["q_proj"]), ("nf4", None)):
            with pytest.raises(ValueError, match=rf"quantize='nf4', .*q_proj.* quantize='{kind}', .* are asked for"):
                quantize(model, kind, exclude=exclude)
        assert torch.equal(run(model), expected)

    def test_a_model_around_a_quantised_one_is_refused(self):
        model = nn.Sequential(quantize(models.llama(), "nf4"), nn.Linear(64, 64))
        with pytest.raises(ValueError, match="quantise a base once"):
            quantize(model, "nf4")

    def test_whole_training_of_a_packed_layer_is_refused(self):
        model = models.llama()
        quantize(model, "nf4")
        with pytest.raises(ValueError, match=r"up_proj.*quantize_exclude"):
            inject(model, LoRAConfig(r=2, modules_to_save=["up_proj"], exclude_modules=["up_proj"]))


class TestBadInput:
    """One clear error, and nothing is changed."""

    def refused(self, model: nn.Module, match: str, **settings) -> None:
        state = {name: value.clone() for name, value in model.state_dict().items()}
        kinds = {name: type(module) for name, module in model.named_modules()}
        with pytest.raises(ValueError, match=match):
            inject(model, CONFIG, **{"quantize": "nf4", **settings})
        assert {name: type(module) for name, module in model.named_modules()} == kinds
        assert all(torch.equal(value, state[name]) or bool(value.isnan().any()) for name, value in
                   model.state_dict().items())  # fmt: skip

    def test_unknown_word(self):
        self.refused(models.llama(), "quantize must be one of 'nf4', 'nf4-dq', 'int8', got 'int4'", quantize="int4")

    def test_an_exclusion_that_hits_nothing(self):
        self.refused(models.llama(), "quantize_exclude.*q_prj", quantize_exclude=["q_prj"])

    @pytest.mark.parametrize("value", [torch.nan, torch.inf])
    def test_weights_that_are_not_finite(self, value):
        model = models.llama()
        model.model.layers[1].mlp.up_proj.weight.data[3, 5] = value
        self.refused(model, r"layers\.1\.mlp\.up_proj holds NaN or infinity")
        model.model.layers[1].mlp.gate_proj.weight.data[3, 5] = value
        self.refused(model, r"gate_proj, model\.layers\.1\.mlp\.up_proj hold NaN or infinity")

    def test_objects_of_another_type_are_named_by_it_alone(self):
        from transformers import BitsAndBytesConfig

        model = models.llama()
        with pytest.raises(ValueError, match="'int8', got a BitsAndBytesConfig$"):
            inject(model, CONFIG, quantize=BitsAndBytesConfig(load_in_4bit=True))
        with pytest.raises(TypeError, match=r"^model must be a module, got str: write quantize\(model, 'nf4'\)$"):
            quantize("nf4", model)
        for exclude in (3, [3]):
            with pytest.raises(TypeError, match=r"quantize_exclude=\[?3\]? must be a list of names, or a regular"):
                inject(model, CONFIG, quantize="nf4", quantize_exclude=exclude)
        assert not packed_names(model)

    def test_a_layer_of_bitsandbytes(self):
        bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
        model = nn.Sequential(nn.Linear(64, 64), bitsandbytes.nn.Linear4bit(64, 64, quant_type="nf4").to("cpu"))
        with pytest.raises(
            ValueError, match="'1' is quantised already, by Linear4bit of bitsandbytes, stored as torch.uint8"
        ):
            inject(model, CONFIG, quantize="nf4")
        assert type(model[0]) is nn.Linear

    def test_a_weight_of_torchao(self):
        torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
        model = nn.Sequential(nn.Linear(64, 64))
        torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
        with pytest.raises(ValueError, match="'0' is quantised already, by Linear of torchao, stored as Int8Tensor"):
            inject(model, CONFIG, quantize="nf4")

    def test_a_weight_of_integers(self):
        model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
        model[1].weight = nn.Parameter(torch.ones(64, 64, dtype=torch.int8), requires_grad=False)
        with pytest.raises(ValueError, match="'1' is quantised already"):
            quantize(model, "nf4")

    def test_a_config_that_does_not_fit_comes_first(self):
        model = models.llama()
        with pytest.raises(ValueError, match="q_prj"):
            inject(model, LoRAConfig(target_modules=["q_prj"]), quantize="nf4")
        assert not packed_names(model)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_end_inside_a_block_and_layers_shorter_than_one_are_served(kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 7), nn.Linear(7, 3), nn.Linear(3, 33, bias=False))
    assert isinstance(plan(model, LoRAConfig(r=1), quantize=kind), Plan)
    inject(model, LoRAConfig(r=1), quantize=kind)
    fill_adapters(model)
    x = torch.randn(5, 40, requires_grad=True)
    y, expected = model(x), x
    for layer in model:
        expected = expected @ (layer.weight + layer.lora_scaling * layer.lora_B @ layer.lora_A).T
        expected = expected if layer.bias is None else expected + layer.bias
    torch.testing.assert_close(y, expected)
    (grad,), (reference,) = (torch.autograd.grad(one.square().sum(), x, retain_graph=True) for one in (y, expected))
    torch.testing.assert_close(grad, reference)


class TestStates:
    """``load_state_dict`` of a quantised model: its own state, a float one, and damaged ones."""

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("dora", [False, True])
    def test_its_own_state_and_the_floating_point_one(self, kind, dora):
        model = inject(models.llama(), LoRAConfig(r=4, use_dora=dora), quantize=kind)
        expected = run(model)
        model.load_state_dict(model.state_dict())
        assert torch.equal(run(model), expected)
        base = {name: value + 0.1 for name, value in models.llama().state_dict().items()}
        model.load_state_dict(base)
        other = models.llama()
        other.load_state_dict(base)
        torch.testing.assert_close(run(model), run(inject(other, LoRAConfig(r=4, use_dora=dora), quantize=kind)))

    def test_the_adapter_alone(self):
        model, other = (inject(models.llama(), CONFIG, quantize="nf4-dq") for _ in range(2))
        fill_adapters(other)
        model.load_state_dict({name: value for name, value in other.state_dict().items() if ".lora_" in name})
        assert torch.equal(run(model), run(other))

    @pytest.mark.parametrize("assign", [False, True])
    @pytest.mark.parametrize("packed", [False, True])
    def test_a_model_on_meta_is_filled_from_either(self, assign, packed):
        source = models.llama()
        model = on_meta(source.config)
        inject(model, CONFIG, quantize="nf4-dq")
        if not assign:
            model.to_empty(device="cpu")
        reference = models.llama()
        quantize(reference, "nf4-dq")
        model.load_state_dict((reference if packed else source).state_dict(), assign=assign)
        for name, buffer in reference.named_buffers():  # rotary frequencies, which no state dict holds
            if "rotary" in name:
                owner, _, local = name.rpartition(".")
                setattr(model.get_submodule(owner), local, buffer)
        assert torch.equal(run(model), run(reference))

    @pytest.mark.parametrize("adapted", [False, True])
    @pytest.mark.parametrize(
        ("damage", "match"),
        [
            (lambda s, n: [s.pop(key) for key in [*s] if key.startswith(n)], "lacks 1 quantised weights.*truncated"),
            (lambda s, n: s.update({n: s[n][:-1]}), "bytes of codes"),
            (lambda s, n: s.pop(f"{n}.absmax"), "parts have the shapes"),
            (
                lambda s, n: s.update({f"{n}.zero_point": torch.zeros(1)}),
                r"has 'model\S*zero_point' \(1 such entries\)",
            ),
            (lambda s, n: s.update({n: torch.full((16, 32), torch.nan)}), "NaN or infinity"),
        ],
        ids=["a layer is missing", "short codes", "no scales", "left over", "NaN"],
    )
    def test_a_damaged_state_changes_nothing(self, adapted, damage, match):
        model = models.llama()
        quantize(model, "nf4")
        if adapted:
            inject(model, CONFIG)
        other = models.llama()
        other.load_state_dict({name: value + 0.1 for name, value in other.state_dict().items()})
        quantize(other, "nf4")
        state, expected = dict(other.state_dict()), run(model)
        damage(state, "model.layers.1.self_attn.k_proj.weight")
        with pytest.raises(ValueError, match=match):
            model.load_state_dict(state)
        assert torch.equal(run(model), expected)
