"""inject and remove: what becomes of the model, and what does not."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
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
from lightning_lora.layers import LoRALayer
from lightning_lora.layers.base import AdapterMode
from lightning_lora.model.state import named_lora_layers
from tests import models
from tests.real_models import rxnmapper

IDS = models.token_ids()


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.norm(self.first(x)).tanh())


class Shared(nn.Module):
    """One layer under two names, as in ALBERT."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = self.first
        self.last = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.first(x).tanh()).tanh())


def seeded(cls) -> nn.Module:
    torch.manual_seed(0)
    return cls()


def mlp() -> nn.Module:
    return seeded(Mlp)


def shared() -> nn.Module:
    return seeded(Shared)


BUILDERS = [models.llama, models.qwen3, models.gpt2, models.bert_classifier, models.encoder, mlp, shared]
CONFIGS = {models.gpt2: {"bias": "all"}, models.bert_classifier: {"bias": "lora_only"}, models.llama: {"dropout": 0.1}}


def config_for(build, **more) -> LoRAConfig:
    return LoRAConfig(r=4, **{**CONFIGS.get(build, {}), **more})


def run(model: nn.Module) -> Tensor:
    if isinstance(model, (Mlp, Shared)):
        return model(torch.linspace(-1, 1, 40).view(5, 8))
    output = model(IDS)
    return output if isinstance(output, Tensor) else output.logits


def train(model: nn.Module, steps: int = 2) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(steps):
        run(model).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def portrait(model: nn.Module) -> dict:
    """All that tells one module tree from another, without values."""
    return {
        name: (
            type(m),
            m.training,
            sorted(set(vars(m))),
            [n for n, p in m._parameters.items() if p is not None],
            [p.requires_grad for p in m._parameters.values() if p is not None],
            *(len(getattr(m, hooks)) for hooks in vars(m) if hooks.endswith("_hooks")),
        )
        for name, m in model.named_modules(remove_duplicate=False)
    }


def assert_same_state(model: nn.Module, expected: dict[str, Tensor]) -> None:
    state = model.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(value, expected[name]) for name, value in state.items())


# the model as a whole


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


# hooks, subclasses, other people's wrappers


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


# ties and shared layers


def test_tied_weights_stay_tied_and_get_one_adapter_each() -> None:
    model = models.llama(tied=True)
    inject(model, LoRAConfig(r=4, target_modules=["embed_tokens", "lm_head"]))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert len(named_lora_layers(model)) == 2
    remove(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_layer_under_two_names_gets_one_adapter_that_serves_both() -> None:
    model = inject(shared(), LoRAConfig(r=4))
    models.fill_adapters(model)
    x, merged = torch.linspace(-1, 1, 40).view(5, 8), shared()
    with torch.no_grad():
        merged.first.weight += 2.0 * model.first.lora_B @ model.first.lora_A
        merged.last.weight += 2.0 * model.last.lora_B @ model.last.lora_A
    assert list(named_lora_layers(model)) == ["first", "last"]
    torch.testing.assert_close(model(x), merged(x))


def test_a_base_checkpoint_of_a_shared_layer_loads_after_injection() -> None:
    model = inject(shared(), LoRAConfig(r=4))
    state = {name: tensor + 1 for name, tensor in shared().state_dict().items()}
    model.load_state_dict(state)
    assert torch.equal(model.first.weight, state["second.weight"])


def test_adapters_of_a_shared_layer_load_by_their_first_name() -> None:
    model, other = inject(shared(), LoRAConfig(r=4)), inject(shared(), LoRAConfig(r=4))
    models.fill_adapters(model)
    load_adapter_state_dict(other, adapter_state_dict(model))
    assert torch.equal(run(other), run(model))
    third = inject(shared(), LoRAConfig(r=4))
    third.load_state_dict(adapter_state_dict(model))
    assert torch.equal(run(third), run(model))


def peft_twin(base: nn.Module, ours: nn.Module, targets: list[str]) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    twin = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=targets))
    tensors = dict(named_adapter_parameters(ours))
    with torch.no_grad():
        for name, parameter in twin.base_model.model.named_parameters():
            if ".lora_" in name:
                parameter.copy_(tensors[name.replace(".default.weight", "")])
    return twin


def test_the_real_albert_with_one_weight_for_twelve_layers_equals_peft() -> None:
    targets = ["query", "value", "ffn", "dense"]
    model = inject(rxnmapper(), LoRAConfig(r=4, target_modules=targets)).eval()
    models.fill_adapters(model, std=0.02)
    twin = peft_twin(rxnmapper(), model, targets).eval()
    logits, expected = model(IDS).logits, twin(IDS).logits
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-4)  # 12 layers of float32, logits of about 10
    logits.square().mean().backward()
    expected.square().mean().backward()
    grads = {
        n.replace(".default.weight", ""): p.grad for n, p in twin.base_model.model.named_parameters() if ".lora_" in n
    }
    for name, parameter in named_adapter_parameters(model):
        torch.testing.assert_close(parameter.grad, grads[name], rtol=1e-3, atol=1e-4 * grads[name].abs().max().item())


def test_the_real_albert_comes_back_from_all_linear_and_embedding_adapters() -> None:
    model = rxnmapper()
    before, state = portrait(model), copy.deepcopy(model.state_dict())
    inject(model, LoRAConfig(r=4))
    assert len(named_lora_layers(model)) == 8  # mapping in, q, k, v, dense, two of the ffn, the head's dense
    train(model, 1)
    remove(model)
    assert portrait(model) == before
    assert_same_state(model, state)


# copies


def through_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def through_torch_save(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def test_the_adapters_dropout_has_a_mode_of_its_own() -> None:
    plain = Mlp().eval()
    before = portrait(plain)
    model = inject(plain, LoRAConfig(r=2, dropout=0.5))
    layers = named_lora_layers(model).values()
    assert not any(layer.drops for layer in layers)  # as its layer was
    for layer in layers:
        layer.start_dropout()
    for copied in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        twins = named_lora_layers(copied).values()
        assert all(layer.drops and not layer.training for layer in twins)
        assert not any(layer.drops for layer in named_lora_layers(copied.eval()).values())
        assert all(layer.drops for layer in named_lora_layers(copied.train()).values())
    assert portrait(remove(model.eval())) == before


@pytest.mark.parametrize("copy_of", [copy.deepcopy, through_pickle, through_torch_save])
@pytest.mark.parametrize("build", [models.llama, models.bert_classifier, models.encoder, mlp, shared])
def test_a_copy_is_whole_and_its_own(copy_of, build) -> None:
    model = inject(build(), config_for(build)).eval()
    models.fill_adapters(model)
    twin = copy_of(model)
    assert torch.equal(run(twin), run(model))
    assert portrait(twin) == portrait(model)
    own = {p.data_ptr() for p in model.parameters()}
    assert not any(p.data_ptr() in own for p in twin.parameters())
    assert_removes_to(twin, build())


def assert_removes_to(model: nn.Module, base: nn.Module) -> None:
    model.load_state_dict(base.state_dict())  # the hook came along
    remove(model)
    assert_same_state(model, base.state_dict())
    assert {n: type(m) for n, m in model.named_modules()} == {n: type(m) for n, m in base.named_modules()}


def test_loading_into_a_copy_leaves_the_first_model_alone() -> None:
    model = inject(models.bert_classifier(), LoRAConfig(r=4))
    twin = copy.deepcopy(model)
    twin.load_state_dict(
        {
            name: tensor + 1
            for name, tensor in models.bert_classifier().state_dict().items()
            if tensor.is_floating_point()
        },
        strict=False,
    )
    remove(model)
    assert_same_state(model, models.bert_classifier().state_dict())


# checkpoints of the base and of the adapters


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


# models without storage


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


# dtypes


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


# batch normalisation


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


# what trains


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


# gradient checkpointing, compilation


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
