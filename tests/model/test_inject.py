"""Injection and removal: names, states, modes, starting values, and what a layer may be."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lora import LoRAConfig, adapter_state_dict, inject, named_adapter_parameters, remove
from lightning_lora.layers import LoRALayer
from lightning_lora.layers.adapt import AdapterMode
from tests import models
from tests.model.small import BUILDERS, IDS, assert_same_state, config_for, mlp, portrait, run, train


@pytest.fixture
def no_fused_attention():
    """Keep torch from choosing another kernel for the base, whose bits differ."""
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.usefixtures("no_fused_attention")
@pytest.mark.parametrize("build", BUILDERS)
def test_an_injected_model_starts_as_its_base_bit_for_bit(build) -> None:
    base, model = build().eval().requires_grad_(False), inject(build(), config_for(build)).eval()
    assert torch.equal(run(model), run(base))


@pytest.mark.parametrize("build", BUILDERS)
def test_remove_gives_the_vanilla_model_back_after_training(build) -> None:
    model = build()
    next(model.parameters()).requires_grad_(False)  # a flag of the user's
    before, state = portrait(model), copy.deepcopy(model.state_dict())
    train(inject(model, config_for(build)))
    assert remove(model) is model
    assert portrait(model) == before
    assert_same_state(model, state)


@pytest.mark.parametrize("build", BUILDERS)
def test_names_of_base_tensors_stay_what_they_were(build) -> None:
    base, model = build(), inject(build(), config_for(build))
    adapters = {name for name in model.state_dict() if name.endswith((".lora_A", ".lora_B"))}
    assert [name for name in model.state_dict() if name not in adapters] == list(base.state_dict())
    modules = [name for name, module in model.named_modules() if not isinstance(module, AdapterMode)]
    assert modules == [name for name, _ in base.named_modules()]


def test_inject_returns_the_same_object_and_a_second_call_changes_nothing() -> None:
    model = models.llama()
    assert inject(model, LoRAConfig(r=4)) is model
    models.fill_adapters(model)
    model.model.norm.weight.requires_grad_(True)
    before, state = portrait(model), copy.deepcopy(model.state_dict())
    assert inject(model, LoRAConfig(r=4)) is model
    assert portrait(model) == before
    assert_same_state(model, state)


def test_inject_remove_inject_gives_the_first_adapters_again() -> None:
    model = inject(models.llama(), LoRAConfig(r=4))
    first = {name: p.detach().clone() for name, p in named_adapter_parameters(model)}
    inject(remove(model), LoRAConfig(r=4))
    assert all(torch.equal(p, first[name]) for name, p in named_adapter_parameters(model))


def test_remove_without_adapters_says_so() -> None:
    with pytest.raises(ValueError, match="LlamaForCausalLM holds no adapters; call inject"):
        remove(models.llama())


def test_remove_leaves_alone_what_was_added_after_injection() -> None:
    model = inject(mlp(), LoRAConfig(r=4))
    model.probe = nn.Linear(8, 2)
    remove(model)
    assert model.probe.weight.requires_grad
    assert type(model.first) is nn.Linear


def test_remove_through_a_wrapper_finds_the_adapted_model() -> None:
    wrapper = nn.Sequential(inject(mlp(), LoRAConfig(r=4)), nn.Linear(8, 8))
    remove(wrapper)
    assert not any(isinstance(m, LoRALayer) for m in wrapper.modules())


def test_named_adapter_parameters_are_the_trainable_ones_with_short_names() -> None:
    wrapper = nn.Sequential(inject(mlp(), LoRAConfig(r=4)))
    named = dict(named_adapter_parameters(wrapper))
    assert list(named) == ["first.lora_A", "first.lora_B", "second.lora_A", "second.lora_B"]
    assert {id(p) for p in named.values()} == {id(p) for p in wrapper.parameters() if p.requires_grad}


def test_starting_values_depend_on_the_name_and_the_seed_alone() -> None:
    one = inject(models.llama(), LoRAConfig(r=4, target_modules=["q_proj"]))
    torch.manual_seed(77)
    other = inject(models.llama(), LoRAConfig(r=4, target_modules=["up_proj", "q_proj"]))
    reseeded = inject(models.llama(), LoRAConfig(r=4, target_modules=["q_proj"], init_seed=1))
    first = dict(named_adapter_parameters(one))
    others, seeded_otherwise = dict(named_adapter_parameters(other)), dict(named_adapter_parameters(reseeded))
    assert all(torch.equal(p, others[name]) for name, p in first.items())
    assert not torch.equal(*(first[f"model.layers.{i}.self_attn.q_proj.lora_A"] for i in (0, 1)))
    assert not any(torch.equal(p, seeded_otherwise[name]) for name, p in first.items() if name.endswith("A"))


def test_injection_by_name_touches_no_random_state() -> None:
    model, state = models.llama(), torch.get_rng_state()
    inject(model, LoRAConfig(r=4))
    assert torch.equal(torch.get_rng_state(), state)


def test_starting_values_have_the_spread_of_kaiming_uniform() -> None:
    model = inject(nn.Sequential(nn.Linear(400, 300)), LoRAConfig(r=200))
    values, bound = model[0].lora_A.detach(), 1 / 400**0.5
    assert values.abs().max().item() <= bound
    # variance of U(-b, b) is b^2 / 3; of 80,000 draws it is known to half a percent
    assert values.var().item() == pytest.approx(bound**2 / 3, rel=0.03)
    assert not model[0].lora_B.any()


def test_hooks_of_the_user_stay_and_fire() -> None:
    model, seen = mlp(), []
    model.first.register_forward_hook(lambda module, args, output: seen.append(output))
    inject(model, LoRAConfig(r=4))
    models.fill_adapters(model)
    run(model.eval())
    x = torch.linspace(-1, 1, 40).view(5, 8)
    assert torch.equal(seen[0], model.first.forward(x))


class Scaled(nn.Linear):
    """A subclass whose own forward an adapter must keep."""

    def forward(self, x: Tensor, factor: float = 2.0) -> Tensor:
        return super().forward(x) * factor


def test_a_linear_subclass_keeps_its_own_forward_and_arguments() -> None:
    model = inject(nn.Sequential(Scaled(8, 8)), LoRAConfig(r=2))
    models.fill_adapters(model)
    layer, x = model[0], torch.randn(3, 8)
    expected = F.linear(x, layer.weight, layer.bias) * 3.0 + 2.0 * x @ layer.lora_A.T @ layer.lora_B.T
    torch.testing.assert_close(layer(x, factor=3.0), expected)
    assert isinstance(layer, Scaled)


def test_a_weight_normed_layer_is_adapted_beside_its_computed_weight() -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)))
    inject(model, LoRAConfig(r=2))
    models.fill_adapters(model)
    layer, x = model[0], torch.randn(3, 8)
    expected = F.linear(x, layer.weight, layer.bias) + 2.0 * x @ layer.lora_A.T @ layer.lora_B.T
    torch.testing.assert_close(model(x), expected)
    remove(model)
    assert torch.equal(model(x), F.linear(x, layer.weight, layer.bias))


def test_a_lazy_layer_without_sizes_is_refused() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.LazyLinear(8))
    with pytest.raises(ValueError, match="'1.weight' has no size yet"):
        inject(model, LoRAConfig(r=2))
    assert all(p.requires_grad for p in model.parameters())


def test_repr_says_rank_and_scale() -> None:
    model = inject(mlp(), LoRAConfig(r=4))
    assert repr(model.first) == "LoRALinear(in_features=8, out_features=16, bias=True, r=4, scaling=2)"


def test_an_adapted_embedding_equals_dense_math() -> None:
    model = inject(nn.Sequential(nn.Embedding(10, 6, padding_idx=2)), LoRAConfig(r=3, target_modules=["0"]))
    models.fill_adapters(model, std=1.0)
    layer, ids = model[0], torch.tensor([[1, 2, 9], [0, 2, 2]])
    table = layer.weight.double() + 2.0 * (layer.lora_B.double() @ layer.lora_A.double()).T
    torch.testing.assert_close(model(ids).double(), table[ids], rtol=1e-5, atol=1e-5)  # float32 sums of 4 terms
    assert model(torch.empty(0, 3, dtype=torch.int64)).shape == (0, 3, 6)


class ScaledEmbedding(nn.Embedding):
    """As in Gemma: what is looked up is multiplied."""

    embed_scale = 5.0

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * self.embed_scale


def test_an_embedding_that_scales_its_output_scales_the_adapters_term_too() -> None:
    model = inject(nn.Sequential(ScaledEmbedding(10, 6)), LoRAConfig(r=3, target_modules=["0"]))
    models.fill_adapters(model, std=1.0)
    layer, ids = model[0], torch.arange(10)
    table = layer.weight.double() + 2.0 * (layer.lora_B.double() @ layer.lora_A.double()).T
    torch.testing.assert_close(model(ids).double(), 5.0 * table, rtol=1e-5, atol=1e-5)  # float32 sums of 4 terms


class ReversedEmbedding(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids).flip(-1)


def test_an_embedding_with_another_forward_is_refused() -> None:
    with pytest.raises(ValueError, match="ReversedEmbedding has a forward of its own"):
        inject(nn.Sequential(ReversedEmbedding(10, 6)), LoRAConfig(r=3, target_modules=["0"]))


@pytest.mark.parametrize("max_passes", [40])
def test_the_work_of_an_injection_grows_with_the_model_and_not_with_its_square(max_passes, monkeypatch) -> None:
    visited = 0
    named_modules = nn.Module.named_modules

    def counting(self, *args, **kwargs):
        nonlocal visited
        for item in named_modules(self, *args, **kwargs):
            visited += 1
            yield item

    model = nn.ModuleList(nn.Linear(4, 4) for _ in range(100))
    monkeypatch.setattr(nn.Module, "named_modules", counting)
    inject(model, LoRAConfig(r=2))
    assert visited <= max_passes * 101  # a bounded number of walks over the modules


def adapter_gradients(model: nn.Module) -> dict[str, Tensor]:
    torch.manual_seed(3)
    model(input_ids=IDS, labels=IDS).loss.backward()
    return {name: p.grad.clone() for name, p in named_adapter_parameters(model)}


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
@pytest.mark.parametrize("reentrant", [True, False, None])
@pytest.mark.parametrize("order", ["inject first", "checkpointing first"])
def test_gradient_checkpointing_with_a_frozen_embedding_gives_every_adapter_the_same_gradient(reentrant, order) -> None:
    arguments = {} if reentrant is None else {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    config = LoRAConfig(r=4, dropout=0.2)
    plain, model = inject(models.llama(), config).train(), models.llama().train()
    if order == "inject first":
        inject(model, config)
        model.gradient_checkpointing_enable(**arguments)
    else:
        model.gradient_checkpointing_enable(**arguments)
        inject(model, config)
    for one in (plain, model):
        models.fill_adapters(one)
    expected, got = adapter_gradients(plain), adapter_gradients(model)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own tracing builds one
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_an_injected_llama_compiles_in_one_graph(dropout) -> None:
    model = inject(models.llama(layers=1), LoRAConfig(r=4, dropout=dropout)).train()
    models.fill_adapters(model)
    expected = adapter_gradients(copy.deepcopy(model))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.manual_seed(3)
    compiled(input_ids=IDS, labels=IDS).loss.backward()
    for name, parameter in named_adapter_parameters(model):
        # float32 sums in another order
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6)


def test_names_are_clean_on_a_compiled_model() -> None:
    model = torch.compile(mlp(), backend="eager")
    inject(model, LoRAConfig(r=4))
    assert list(adapter_state_dict(model)) == ["first.lora_A", "first.lora_B", "second.lora_A", "second.lora_B"]
    assert not any(isinstance(m, LoRALayer) for m in remove(model).modules())
