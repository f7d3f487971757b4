"""State dicts, dtypes, batch normalisation, heads and biases of an adapted model."""

import copy

import pytest
import torch
from torch import Tensor, nn

from lightning_lora import (
    LoRAConfig,
    adapter_state_dict,
    disabled,
    inject,
    load_adapter_state_dict,
    named_adapter_parameters,
    remove,
)
from tests import models
from tests.model.small import BUILDERS, Mlp, assert_same_state, config_for, mlp, run, train


def test_a_base_checkpoint_loads_after_injection_and_leaves_the_adapters() -> None:
    model = inject(models.llama(), LoRAConfig(r=4))
    models.fill_adapters(model)
    adapters = {name: p.detach().clone() for name, p in named_adapter_parameters(model)}
    state = {name: tensor + 0.5 for name, tensor in models.llama().state_dict().items()}
    result = model.load_state_dict(state)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert all(torch.equal(p, adapters[name]) for name, p in named_adapter_parameters(model))
    remove(model)
    assert_same_state(model, state)


def test_a_base_checkpoint_loads_through_a_wrapper() -> None:
    wrapper = nn.ModuleDict({"model": inject(mlp(), LoRAConfig(r=4)), "head": nn.Linear(8, 2)})
    state = nn.ModuleDict({"model": mlp(), "head": nn.Linear(8, 2)}).state_dict()
    wrapper.load_state_dict(state)
    assert torch.equal(wrapper["model"].first.weight, state["model.first.weight"])


def test_the_head_of_a_base_checkpoint_becomes_the_first_value_of_the_head() -> None:
    model = inject(models.bert_classifier(), LoRAConfig(r=4))
    state = {name: tensor + 1 if tensor.is_floating_point() else tensor for name, tensor in model.state_dict().items()}
    base = {name: tensor for name, tensor in state.items() if "lora_" not in name}
    model.load_state_dict(base)
    train(model)
    assert_same_state(remove(model), base)


def test_a_base_checkpoint_of_another_shape_is_still_an_error() -> None:
    model = inject(mlp(), LoRAConfig(r=4))
    state = {**mlp().state_dict(), "first.weight": torch.zeros(3, 3)}
    with pytest.raises(RuntimeError, match=r"first\.weight"):
        model.load_state_dict(state)


def test_the_adapters_alone_load_strictly() -> None:
    source, model = (inject(models.bert_classifier(), LoRAConfig(r=4)) for _ in range(2))
    models.fill_adapters(source)
    train(source)
    model.load_state_dict(adapter_state_dict(source))
    assert torch.equal(run(model), run(source))


def test_the_adapters_alone_load_into_a_batch_normalisation_that_trains_whole() -> None:
    source, model = (inject(mlp(), LoRAConfig(r=4, modules_to_save=["norm"])).train() for _ in range(2))
    train(source)
    load_adapter_state_dict(model, adapter_state_dict(source))
    assert torch.equal(run(model.eval()), run(source.eval()))


def test_a_whole_state_of_an_adapted_model_loads_strictly() -> None:
    source, model = (inject(models.llama(), LoRAConfig(r=4)) for _ in range(2))
    models.fill_adapters(source)
    model.load_state_dict(source.state_dict())
    assert torch.equal(run(model), run(source))


@pytest.mark.parametrize("with_base", [True, False])
def test_one_missing_adapter_among_others_is_an_error(with_base) -> None:
    model = inject(models.llama(), LoRAConfig(r=4))
    state = dict(model.state_dict()) if with_base else adapter_state_dict(model)
    del state["model.layers.0.self_attn.q_proj.lora_B"]
    with pytest.raises(RuntimeError, match=r"layers\.0\.self_attn\.q_proj\.lora_B"):
        model.load_state_dict(state)


def test_an_unknown_adapter_is_an_error() -> None:
    model = inject(models.llama(), LoRAConfig(r=4))
    state = {**model.state_dict(), "model.norm.lora_A": torch.zeros(1)}
    with pytest.raises(RuntimeError, match=r"model\.norm\.lora_A"):
        model.load_state_dict(state)


def test_loading_writes_nothing_into_the_callers_state() -> None:
    model, state = inject(mlp(), LoRAConfig(r=4)), mlp().state_dict()
    names = list(state)
    model.load_state_dict(state)
    assert list(state) == names


def test_adapters_are_real_on_a_meta_base_and_survive_materialisation() -> None:
    with torch.device("meta"):
        model = inject(Mlp(), LoRAConfig(r=4))
    expected = dict(named_adapter_parameters(inject(mlp(), LoRAConfig(r=4))))
    assert all(p.device.type == "cpu" for _, p in named_adapter_parameters(model))
    model.to_empty(device="cpu")
    for module in model.modules():  # what Lightning does next
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert all(torch.equal(p, expected[name]) for name, p in named_adapter_parameters(model))
    model.load_state_dict(mlp().state_dict())
    assert torch.equal(run(model.eval()), run(mlp().eval()))


def test_a_meta_base_takes_a_checkpoint_by_assignment() -> None:
    with torch.device("meta"):
        model = inject(Mlp(), LoRAConfig(r=4))
    model.load_state_dict(mlp().state_dict(), assign=True)
    models.fill_adapters(model)
    expected = inject(mlp(), LoRAConfig(r=4)).eval()
    models.fill_adapters(expected)
    assert torch.equal(run(model.eval()), run(expected))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained == [name for name, p in expected.named_parameters() if p.requires_grad]


@pytest.mark.parametrize("empty_init", [True, False])
def test_adapters_made_inside_fabrics_init_module_have_their_starting_values(empty_init) -> None:
    from lightning.fabric import Fabric

    with Fabric(accelerator="cpu", devices=1).init_module(empty_init=empty_init):
        model = inject(Mlp(), LoRAConfig(r=4))
    expected = dict(named_adapter_parameters(inject(mlp(), LoRAConfig(r=4))))
    assert all(torch.equal(p, expected[name]) for name, p in named_adapter_parameters(model))


def test_the_first_value_of_a_head_that_was_on_meta_comes_with_the_base_checkpoint() -> None:
    with torch.device("meta"):
        model = inject(Mlp(), LoRAConfig(r=4, target_modules=["first"], modules_to_save=["second"]))
    model.to_empty(device="cpu")
    with pytest.raises(ValueError, match=r"the first value of 'second\.weight' is unknown"):
        remove(model)
    model.load_state_dict(mlp().state_dict())
    train(model.train())
    assert_same_state(remove(model), mlp().state_dict())


def dtypes(model: nn.Module) -> tuple[torch.dtype, torch.dtype]:
    return model.first.weight.dtype, model.first.lora_A.dtype


@pytest.mark.parametrize(
    ("cast", "expected"),
    [
        (lambda m: m.half(), (torch.float16, torch.float32)),
        (lambda m: m.bfloat16(), (torch.bfloat16, torch.float32)),
        (lambda m: m.to(torch.bfloat16), (torch.bfloat16, torch.float32)),
        (lambda m: m.double(), (torch.float64, torch.float64)),
        (lambda m: m.double().float(), (torch.float32, torch.float32)),
        (lambda m: m.half().double(), (torch.float64, torch.float64)),
        (lambda m: m.to("cpu"), (torch.float32, torch.float32)),
    ],
)
def test_a_cast_never_narrows_the_adapters(cast, expected) -> None:
    model = cast(inject(mlp(), LoRAConfig(r=4)))
    assert dtypes(model) == expected
    assert model.first(torch.randn(2, 8, dtype=expected[0])).dtype == expected[0]


def test_a_cast_to_half_keeps_every_bit_of_the_adapters_and_their_gradients() -> None:
    model = inject(mlp(), LoRAConfig(r=4))
    run(model).sum().backward()
    before = {n: (p.detach().clone(), p.grad.clone(), id(p)) for n, p in named_adapter_parameters(model)}
    model.bfloat16()
    for name, parameter in named_adapter_parameters(model):
        value, grad, identity = before[name]
        assert torch.equal(parameter, value)
        assert torch.equal(parameter.grad, grad)
        assert id(parameter) == identity  # an optimizer still holds it


@pytest.mark.parametrize(
    ("word", "made"), [("auto", torch.bfloat16), ("bfloat16", torch.bfloat16), ("float64", torch.float64)]
)
def test_adapters_are_made_in_the_dtype_that_was_asked_for(word, made) -> None:
    model = inject(mlp().bfloat16(), LoRAConfig(r=4, adapter_dtype=word))
    assert dtypes(model) == (torch.bfloat16, made)


def test_automatic_adapters_follow_the_base() -> None:
    model = inject(mlp().bfloat16(), LoRAConfig(r=4, adapter_dtype="auto"))
    assert dtypes(model.float()) == (torch.float32, torch.float32)
    assert dtypes(model.half()) == (torch.float16, torch.float16)


def test_a_bf16_base_with_float32_adapters_trains_and_keeps_dtypes() -> None:
    model = inject(models.llama(dtype=torch.bfloat16), LoRAConfig(r=4))
    train(model)
    assert run(model).dtype == torch.bfloat16
    assert {p.dtype for _, p in named_adapter_parameters(model)} == {torch.float32}
    assert any(p.abs().sum() > 0 for name, p in named_adapter_parameters(model) if name.endswith("B"))


@pytest.mark.parametrize("build", BUILDERS)
def test_code_that_reads_the_dtype_of_the_first_parameter_sees_the_base(build) -> None:
    model = inject(
        build().bfloat16(),
        config_for(build, target_modules=r".*(proj|c_attn|query|word_embeddings|embed_tokens|embed|wte|first|linear1)"),
    )
    assert next(model.parameters()).dtype == torch.bfloat16
    assert getattr(model, "dtype", torch.bfloat16) == torch.bfloat16


def batch(rows: int = 16) -> Tensor:
    return torch.randn(rows, 8) * 3 + 1


def test_statistics_of_the_frozen_base_stay_put_in_training() -> None:
    model = inject(mlp(), LoRAConfig(r=4)).train()
    before = copy.deepcopy(model.norm.state_dict())
    training = model(batch())
    assert not model.norm.training
    assert all(torch.equal(value, before[name]) for name, value in model.norm.state_dict().items())
    assert training.shape == (16, 8)


def test_statistics_move_inside_a_module_that_trains_whole() -> None:
    model = inject(mlp(), LoRAConfig(r=4, modules_to_save=["norm"])).train()
    before = model.norm.running_mean.clone()
    model(batch())
    assert not torch.equal(model.norm.running_mean, before)


@pytest.mark.parametrize("mode", [True, False])
def test_after_remove_a_batch_normalisation_is_in_the_mode_that_was_last_asked_for(mode) -> None:
    model = inject(mlp().train(not mode), LoRAConfig(r=4))
    model.train(mode)
    remove(model)
    assert model.norm.training is mode
    assert type(model.norm) is nn.BatchNorm1d


def test_after_remove_statistics_move_again() -> None:
    model = remove(inject(mlp(), LoRAConfig(r=4))).train()
    before = model.norm.running_mean.clone()
    model(batch())
    assert not torch.equal(model.norm.running_mean, before)


def test_the_classifiers_head_gets_gradients_and_the_body_none() -> None:
    model = inject(models.bert_classifier(), LoRAConfig(r=4))
    models.fill_adapters(model)
    run(model).square().sum().backward()
    with_grad = {name for name, p in model.named_parameters() if p.grad is not None}
    adapters = {name for name, _ in named_adapter_parameters(model)}
    assert with_grad == adapters | {"classifier.weight", "classifier.bias"}


@pytest.mark.parametrize(
    ("bias", "names"),
    [("none", set()), ("lora_only", {"first.bias"}), ("all", {"first.bias", "norm.bias", "second.bias"})],
)
def test_biases_that_train_are_the_ones_asked_for(bias, names) -> None:
    model = inject(mlp(), LoRAConfig(r=4, target_modules=["first"], bias=bias))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == names | {"first.lora_A", "first.lora_B"}


def test_disabled_shows_the_first_bias_again() -> None:
    base, model = mlp().eval(), inject(mlp(), LoRAConfig(r=4, bias="all")).eval()
    train(model)
    with disabled(model):
        inside = run(model)
    assert torch.equal(inside, run(base))
    assert not torch.equal(run(model), inside)
