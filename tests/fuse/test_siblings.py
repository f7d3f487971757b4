"""Layers that share an input and gated MLPs, found in models: what is found, what is left, and that nothing else changes."""

import copy
import gc
import io
import pickle
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_lora import LoRAConfig, disabled, inject, merged, named_adapter_parameters, register_gated_mlp, remove
from lightning_lora.fuse import gated_mlp, release, siblings
from lightning_lora.fuse.gated_mlp import LoRAGatedMLP
from lightning_lora.model.state import named_lora_layers
from tests import models

IDS = models.token_ids(2, 6)
CLOSE = {"rtol": 1e-5, "atol": 1e-6}  # float32: products of other shapes
COMPILES = pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated:DeprecationWarning", "ignore:The .grad attribute of a Tensor:UserWarning"
)


class Counts:
    """How often the functions for several layers ran."""

    def __init__(self, monkeypatch) -> None:
        self.siblings = self.mlps = 0
        several, mlp = siblings.Siblings.compute_all, gated_mlp.lora_gated_mlp

        def count_siblings(*args, **kwargs):
            self.siblings += 1
            return several(*args, **kwargs)

        def count_mlps(*args, **kwargs):
            self.mlps += 1
            return mlp(*args, **kwargs)

        monkeypatch.setattr(siblings.Siblings, "compute_all", staticmethod(count_siblings))
        monkeypatch.setattr(gated_mlp, "lora_gated_mlp", count_mlps)

    def pair(self) -> tuple[int, int]:
        found = self.siblings, self.mlps
        self.siblings = self.mlps = 0
        return found


@pytest.fixture
def counts(monkeypatch) -> Counts:
    return Counts(monkeypatch)


def adapted(model: nn.Module, **config) -> nn.Module:
    inject(model, LoRAConfig(**{"r": 4, **config})).train()
    models.fill_adapters(model)
    return model


def one_by_one(model: nn.Module) -> nn.Module:
    """A copy whose layers compute each on its own."""
    alone = copy.deepcopy(model)
    for module in alone.modules():
        module.__dict__.pop("lora_siblings", None)
        if isinstance(module, LoRAGatedMLP):
            release(module)
    return alone


def loss_and_gradients(model: nn.Module, run=None) -> dict[str, Tensor]:
    model.zero_grad()
    loss = run(model) if run else model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    return {"loss": loss.detach(), **{n: p.grad.clone() for n, p in named_adapter_parameters(model)}}


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, value in got.items():
        torch.testing.assert_close(value, expected[name], msg=lambda m, n=name: f"{n}: {m}", **CLOSE)


# what is found


def groups(model: nn.Module) -> list[list[str]]:
    """Names of the layers that are computed together, by module."""
    found = []
    for module in model.modules():
        by_group: dict[int, list[str]] = {}
        for name, child in module._modules.items():
            if getattr(child, "lora_siblings", None) is not None:
                by_group.setdefault(id(child.lora_siblings), []).append(name)
        found += by_group.values()
    return found


def test_names_of_layers_propose_groups() -> None:
    assert groups(adapted(models.llama(layers=1))) == [["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]]
    assert groups(adapted(models.bert_classifier(), modules_to_save=[])) == [["query", "key", "value"]] * 2
    assert groups(adapted(models.gpt2(), target_modules=["c_attn"])) == []
    other = nn.ModuleDict({name: nn.Linear(8, 8) for name in ("first", "second")})
    assert groups(adapted(other, target_modules=["first", "second"])) == []


class Cross(nn.Module):
    """Attends from one tensor to another, in the order of T5 or of Whisper."""

    def __init__(self, order: str) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.order = order

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        y = {name: getattr(self, name)(x if name == "q" else context) for name in self.order}
        return y["q"].tanh() * y["k"] * y["v"]


@pytest.mark.parametrize("order", ["qkv", "kvq"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_layer_with_another_input_leaves_its_group_after_a_step(order, dropout, counts) -> None:
    model = adapted(nn.ModuleList([Cross(order)]), target_modules=["q", "k", "v"], dropout=dropout)
    alone, optimizer = one_by_one(model), torch.optim.SGD(model.parameters(), lr=0.0)
    for _ in range(6):
        x, context = torch.randn(3, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True)[:3]
        run = lambda m: m[0](x, context).square().sum()  # noqa: B023, E731
        counts.pair()
        got = loss_and_gradients(model, run)
        if not dropout:
            assert_same(got, loss_and_gradients(alone, run))
        optimizer.step()
    assert groups(model) == [["k", "v"]]
    assert counts.pair() == (1, 0)


def test_fuse_false_runs_every_modules_own_code(counts) -> None:
    model, fused = adapted(models.llama(), fuse=False), adapted(models.llama())
    assert groups(model) == []
    assert {type(m).__name__ for m in model.modules() if hasattr(type(m), "lora_base_class")} == {"LoRALinear"}
    got = loss_and_gradients(model)
    assert counts.pair() == (0, 0)
    assert_same(got, loss_and_gradients(fused))


GATED = {
    "LlamaForCausalLM": "silu",
    "MistralForCausalLM": "silu",
    "Qwen2ForCausalLM": "silu",
    "Qwen3ForCausalLM": "silu",
    "OlmoForCausalLM": "silu",
    "SmolLM3ForCausalLM": "silu",
    "GemmaForCausalLM": "gelu_tanh",
    "Gemma2ForCausalLM": "gelu_tanh",
    "Gemma3ForCausalLM": "gelu_tanh",
}


@pytest.mark.parametrize(("family", "activation"), GATED.items())
def test_families_with_gated_mlps_are_recognised(family, activation, counts) -> None:
    import transformers

    config_class = getattr(transformers, family).config_class
    config_class = getattr(config_class, "sub_configs", {}).get("text_config", config_class)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = config_class(**sizes, num_key_value_heads=2, head_dim=8, vocab_size=models.VOCAB, pad_token_id=0)
    torch.manual_seed(0)
    model = adapted(getattr(transformers, family)(config))
    fused = [module for module in model.modules() if isinstance(module, LoRAGatedMLP)]
    assert [module.lora_activation for module in fused] == [activation] * 2
    got = loss_and_gradients(model)
    assert counts.pair() == (2, 2)
    assert_same(got, loss_and_gradients(one_by_one(model)))
    assert counts.pair() == (0, 0)


class Gated(nn.Module):
    """A gated MLP under names and in a text of its own."""

    def __init__(self, activation: nn.Module | None = None) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(8, 12), nn.Linear(8, 12, bias=False), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        opened = F.gelu(self.first(x), approximate="tanh")
        return self.last(self.second(x) * opened)


GATED_TARGETS = {"target_modules": ["first", "second", "last"]}
ROLES = {"gate": "first", "up": "second", "down": "last"}


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setattr(gated_mlp, "_registered", {})
    register_gated_mlp(Gated, **ROLES, activation="gelu_tanh")


def test_a_registered_class_and_its_subclasses_are_fused(registered, counts) -> None:
    for cls in (Gated, type("Derived", (Gated,), {})):
        model, x = adapted(nn.Sequential(cls()), **GATED_TARGETS), torch.randn(3, 8)
        run = lambda m: m(x).square().sum()  # noqa: B023, E731
        got = loss_and_gradients(model, run)
        assert counts.pair() == (0, 1)
        assert_same(got, loss_and_gradients(one_by_one(model), run))


def test_a_class_that_nobody_registered_or_with_another_forward_is_left_alone(registered, counts) -> None:
    other = type("Other", (Gated,), {"forward": lambda self, x: 2 * Gated.forward(self, x)})
    model = adapted(nn.Sequential(other()), **GATED_TARGETS)
    model(torch.randn(3, 8))
    assert counts.pair() == (0, 0)


def test_registering_what_is_no_gated_mlp_is_an_error(monkeypatch) -> None:
    monkeypatch.setattr(gated_mlp, "_registered", {})
    with pytest.raises(TypeError, match="a subclass of torch.nn.Module, got 3"):
        register_gated_mlp(3, **ROLES)
    with pytest.raises(ValueError, match="activation='swish' is unknown; it is one of 'silu', 'gelu_tanh'"):
        register_gated_mlp(Gated, **ROLES, activation="swish")
    register_gated_mlp(Gated, **{**ROLES, "down": "final"})
    with pytest.raises(ValueError, match="told that Gated has a layer 'final', and it has none"):
        adapted(nn.Sequential(Gated()), **GATED_TARGETS)


def test_layers_of_other_kinds_ranks_or_scales_are_left_alone(counts) -> None:
    for options, expected in {
        "rank": ({"rank_pattern": {"k_proj": 2}, "use_rslora": True}, (2, 2)),  # q and v
        "only q and v": ({"target_modules": ["q_proj", "v_proj"]}, (2, 0)),
        "gate and up, not down": ({"target_modules": ["gate_proj", "up_proj"]}, (2, 0)),
        "dora": ({"use_dora": True}, (0, 0)),
        "bias": ({"lora_bias": True}, (0, 0)),
        "residual": ({"init": "pissa_niter_2"}, (0, 0)),
    }.values():
        model = adapted(models.llama(), **options)
        got = loss_and_gradients(model)
        assert counts.pair() == expected, options
        assert_same(got, loss_and_gradients(one_by_one(model)))


def test_ranks_may_differ_where_scales_are_equal(counts) -> None:
    model = adapted(models.llama(), rank_pattern={"k_proj": 2, "up_proj": 3})  # alpha is twice the rank: one scale
    got = loss_and_gradients(model)
    assert counts.pair() == (2, 2)
    assert_same(got, loss_and_gradients(one_by_one(model)))


# when it is used


def test_hooks_see_what_they_see_without_it(counts) -> None:
    model = adapted(models.llama())
    layer = model.model.layers[0]
    seen: list[str] = []
    layer.self_attn.k_proj.register_forward_hook(lambda *_: seen.append("k"))
    layer.mlp.down_proj.register_forward_hook(lambda module, args, y: seen.append("down") or y * 2)
    layer.mlp.act_fn.register_full_backward_hook(lambda *_: seen.append("act"))
    expected = one_by_one(model)
    assert_same(loss_and_gradients(model), loss_and_gradients(expected))
    assert counts.pair() == (3, 1)  # an MLP with hooks falls back to gate and up
    assert seen == ["k", "down", "act"] * 2


def test_a_hook_that_changes_one_layers_input_or_weight_is_obeyed(counts) -> None:
    model = adapted(models.llama())
    attention = model.model.layers[0].self_attn
    handle = attention.k_proj.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    assert_same(loss_and_gradients(model), loss_and_gradients(one_by_one(model)))
    assert counts.pair() == (1, 2)
    handle.remove()
    scale = lambda module, args: setattr(module.weight, "data", module.weight * 1.5)  # noqa: E731
    model.model.layers[0].mlp.up_proj.register_forward_pre_hook(scale)
    assert_same(loss_and_gradients(copy.deepcopy(model)), loss_and_gradients(one_by_one(model)))


def test_global_hooks_see_every_layer() -> None:
    model, seen = adapted(models.llama(layers=1)), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, y: seen.append(module))
    try:
        model(input_ids=IDS)
    finally:
        handle.remove()
    assert all(layer in seen for layer in named_lora_layers(model).values())


class Changing(nn.Module):
    """Changes its input in place between two calls, by a way that its code does not show."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 8)
        self.between = lambda x: x

    def forward(self, x: Tensor) -> Tensor:
        y = self.q(x)
        self.between(x)
        return y + self.k(x)


def test_an_input_that_changes_between_two_calls_is_computed_anew(counts) -> None:
    model = adapted(nn.Sequential(Changing()), target_modules=["q", "k"])
    alone, x = one_by_one(model), torch.randn(3, 8)
    with torch.no_grad():
        torch.testing.assert_close(model(x.clone()), alone(x.clone()), **CLOSE)
        assert counts.pair() == (1, 0)
        for one in (model, alone):
            one[0].between = lambda t: t.mul_(3)
        torch.testing.assert_close(model(x.clone()), alone(x.clone()), **CLOSE)


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 8)
        self.stop = False

    def forward(self, x: Tensor) -> Tensor:
        y = self.q(x)
        if self.stop:
            return y
        z = self.k(x)
        return y + z


def test_outputs_that_a_failed_step_left_are_freed_with_their_model() -> None:
    model = adapted(nn.Sequential(Unused()), target_modules=["q", "k"])
    model[0].stop = True
    model(torch.randn(3, 8))
    weight = weakref.ref(model[0].q.weight)
    del model
    gc.collect()
    assert weight() is None


def test_copies_hold_no_outputs() -> None:
    model, x = adapted(nn.Sequential(Unused()), target_modules=["q", "k"]), torch.randn(3, 8)
    model[0].q(x)
    assert not copy.deepcopy(model)[0].q.lora_siblings.held


def test_outputs_that_nobody_asks_for_are_computed_a_few_times_at_most(counts) -> None:
    model = adapted(nn.Sequential(Unused()), target_modules=["q", "k"])
    model[0].stop = True
    x, optimizer = torch.randn(3, 8), torch.optim.SGD(model[0].q.parameters())
    for _ in range(10):
        model(x).sum().backward()
        optimizer.step()
    assert counts.pair()[0] <= siblings.MAX_UNREAD + 1  # it takes effect with the next step
    assert model[0].k.lora_A.grad is None


def test_a_third_output_that_nobody_asks_for_is_computed_a_few_times_at_most(counts) -> None:
    module = adapted(nn.Sequential(Three()), target_modules=["q", "k", "v"])[0].eval()
    with torch.no_grad():
        for _ in range(10):
            x = torch.randn(3, 8)
            module.q(x), module.k(x)
    assert groups(nn.Sequential(module)) == [["q", "k"]]


def test_outputs_that_are_not_asked_for_now_and_then_are_no_reason_to_give_up(counts) -> None:
    module = adapted(nn.Sequential(Three()), target_modules=["q", "k", "v"])[0].eval()
    with torch.no_grad():
        for _ in range(3 * siblings.MAX_UNREAD):
            module.q(torch.randn(3, 8))
            module(torch.randn(3, 8))
    assert counts.pair()[0] == 6 * siblings.MAX_UNREAD


class Three(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.q(x), self.k(x), self.v(x)


CHANGES = {
    "weights": lambda layer, x: nn.init.ones_(layer.lora_B),
    "another weight": lambda layer, x: setattr(layer, "lora_B", nn.Parameter(torch.ones(8, 4))),
    "a weight trains": lambda layer, x: layer.weight.requires_grad_(True),
    "mode": lambda layer, x: layer.eval(),
    "the input wants a gradient": lambda layer, x: x.requires_grad_(True),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_layer_that_changed_since_its_output_was_computed_computes_it_anew(change) -> None:
    module, x = adapted(nn.Sequential(Three()), target_modules=["q", "k", "v"], dropout=0.5)[0], torch.randn(3, 8)
    module.q(x)
    change(module.k, x)
    wanted = [p for p in (x, module.k.weight, module.k.lora_B) if p.requires_grad]
    torch.manual_seed(0)
    got = module.k(x)
    torch.manual_seed(0)
    expected = one_by_one(module.k)(x)
    torch.testing.assert_close(got, expected, **CLOSE)
    assert all(grad is not None for grad in torch.autograd.grad(got.sum(), wanted, allow_unused=True))


def test_without_a_graph_before_them_outputs_take_a_backward_pass_each() -> None:
    module = adapted(nn.Sequential(Three()), target_modules=["q", "k", "v"])[0]
    alone, x = one_by_one(module), torch.randn(3, 8)
    for one in (module, alone):
        for y in one(x):
            y.square().sum().backward()
    for layer, other in zip((module.q, module.k, module.v), (alone.q, alone.k, alone.v), strict=True):
        torch.testing.assert_close(layer.lora_A.grad, other.lora_A.grad, **CLOSE)


class CutShort(nn.Module):
    """Runs one module several times in activation checkpoints, most of them without its last layer."""

    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.inner, self.use_reentrant = Unused(), use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        for stop in (False, True, True, True, True):
            x = checkpoint(self._run, x, stop, use_reentrant=self.use_reentrant)
        return x

    def _run(self, x: Tensor, stop: bool) -> Tensor:
        self.inner.stop = stop
        return self.inner(x).tanh()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_layers_that_are_found_unfit_in_a_forward_are_run_again_as_they_ran(use_reentrant) -> None:
    model = adapted(CutShort(use_reentrant), target_modules=["q", "k"], dropout=0.5)
    runs = [copy.deepcopy(model) for _ in range(3)]
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    direction, losses = torch.randn(8, 4, dtype=torch.float64), []
    for run, step in zip(runs, (0.0, 1e-6, -1e-6), strict=True):
        run.double()
        run.inner.q.lora_B.data.add_(direction, alpha=step)
        torch.manual_seed(0)
        losses.append(run(x).sum())
    losses[0].backward()
    expected = (losses[1] - losses[2]).item() / 2e-6
    # central differences of 1e-6 in float64
    torch.testing.assert_close((runs[0].inner.q.lora_B.grad * direction).sum().item(), expected, rtol=1e-6, atol=1e-8)


class Silent(nn.Module):
    """A gated MLP in T5Gemma's text, that a user may change."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)
        self.act_fn, self.dropout = nn.SiLU(), nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        """Return what T5Gemma's does; this text is no part of the code that is compared."""
        h = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        h = self.dropout(h)
        y = self.down_proj(h)
        return y


SILENT = {"target_modules": ["gate_proj", "up_proj", "down_proj"]}


def test_a_gated_mlp_that_casts_between_its_layers_does(counts) -> None:
    from transformers import T5Config
    from transformers.models.t5.modeling_t5 import T5DenseGatedActDense

    config = T5Config(d_model=8, d_ff=12, dropout_rate=0.0, feed_forward_proj="gated-silu")
    mlp = T5DenseGatedActDense(config).to(torch.bfloat16)
    module = adapted(nn.Sequential(mlp), target_modules=["wi_0", "wi_1", "wo"])[0]
    x = torch.randn(3, 8, dtype=torch.bfloat16)
    module(x)
    assert counts.pair() == (0, 1)
    module.wo.float()
    y = module(x)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, one_by_one(module)(x), **CLOSE)


MLP_CHANGES = {
    "a layer's forward": lambda m: setattr(m.up_proj, "forward", lambda x: type(m.up_proj).forward(m.up_proj, x) * 3),
    "the module's forward": lambda m: setattr(m, "forward", lambda x: type(m).forward(m, x) * 3),
    "the activation": lambda m: setattr(m, "act_fn", nn.Tanh()),
    "the activation to another one that is known": lambda m: setattr(m, "act_fn", nn.GELU()),
    "its dropout": lambda m: setattr(m.dropout, "p", 1.0),
}


@pytest.mark.parametrize("change", MLP_CHANGES.values(), ids=MLP_CHANGES)
def test_a_gated_mlp_that_is_changed_later_does_what_it_then_says(change, counts) -> None:
    module, x = adapted(nn.Sequential(Silent()), **SILENT)[0], torch.randn(3, 8)
    module(x)
    assert counts.pair() == (0, 1)
    alone = one_by_one(module)
    change(module), change(alone)
    torch.testing.assert_close(module(x), alone(x), **CLOSE)
    assert counts.pair()[1] == ("forward" in vars(module))  # that one calls the class's


def test_a_gated_mlp_whose_class_is_patched_later_does_what_it_then_says(monkeypatch) -> None:
    module, x = adapted(nn.Sequential(Silent()), **SILENT)[0], torch.randn(3, 8)
    before, former = module(x), Silent.forward
    monkeypatch.setattr(Silent, "forward", lambda self, x: former(self, x) * 2)
    torch.testing.assert_close(module(x), before * 2, **CLOSE)


def test_dropout_between_the_layers_is_fused_where_it_is_off(counts) -> None:
    module, x = adapted(nn.Sequential(Silent()), **SILENT)[0], torch.randn(3, 8)
    module.dropout.p = 0.5
    module(x)
    assert counts.pair()[1] == 0
    module.eval()(x)
    assert counts.pair()[1] == 1


class Unlike:
    """Forwards that are one instruction away from Silent's, or mean another thing by the same instructions."""

    def noted(self, x):
        h = self.last = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        h = self.dropout(h)
        y = self.down_proj(h)
        return y

    def other_way_round(self, x):
        h = self.gate_proj(x) * self.act_fn(self.up_proj(x))
        h = self.dropout(h)
        y = self.down_proj(h)
        return y

    def added(self, x):
        h = self.act_fn(self.gate_proj(x)) + self.up_proj(x)
        h = self.dropout(h)
        y = self.down_proj(h)
        return y

    def with_a_default(self, x=None):
        h = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        h = self.dropout(h)
        y = self.down_proj(h)
        return y


@pytest.mark.parametrize("name", [name for name in vars(Unlike) if not name.startswith("_")])
def test_another_code_is_left_alone(name) -> None:
    other = type(name, (Silent,), {"forward": getattr(Unlike, name)})
    assert isinstance(adapted(nn.Sequential(Silent()), **SILENT)[0], LoRAGatedMLP)
    assert not isinstance(adapted(nn.Sequential(other()), **SILENT)[0], LoRAGatedMLP)


def test_the_same_code_with_another_meaning_of_its_global_names_is_left_alone() -> None:
    def lfm2(functional) -> type[nn.Module]:
        namespace: dict = {}
        code = "def forward(self, x):\n    return self.w2(F.silu(self.w1(x)) * self.w3(x))"
        exec(f"import torch.nn.functional as F\n{code}", namespace)
        namespace["F"] = functional
        layers = {"w1": nn.Linear(8, 12), "w3": nn.Linear(8, 12), "w2": nn.Linear(12, 8)}
        module = type("Lfm2", (nn.Module,), {"forward": namespace["forward"]})()
        for key, layer in layers.items():
            module.add_module(key, layer)
        return adapted(nn.Sequential(module), target_modules=list(layers))[0]

    assert isinstance(lfm2(F), LoRAGatedMLP)
    assert not isinstance(lfm2(SimpleNamespace(silu=torch.tanh)), LoRAGatedMLP)


@pytest.mark.parametrize("activation", [nn.Tanh(), nn.PReLU(), nn.Identity()])
def test_an_activation_that_is_not_known_is_left_alone(activation) -> None:
    module = Silent()
    module.act_fn = activation
    assert not isinstance(adapted(nn.Sequential(module), **SILENT)[0], LoRAGatedMLP)


def test_without_gradients_in_inference_mode_and_while_generating_it_gives_the_same(counts) -> None:
    model = adapted(models.llama()).eval()
    expected = one_by_one(model)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            torch.testing.assert_close(model(IDS).logits, expected(IDS).logits, **CLOSE)
    assert counts.pair() == (2, 4)  # tensors of inference mode keep no version: their siblings compute alone
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(IDS, **options), expected.generate(IDS, **options))


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_activation_checkpointing_gives_the_same_gradients(use_reentrant, dropout) -> None:
    model = adapted(models.llama(), dropout=dropout)
    torch.manual_seed(5)
    expected = loss_and_gradients(model)
    models.checkpoint_activations(model, {"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    torch.manual_seed(5)
    assert_same(loss_and_gradients(model), expected)


def test_a_checkpoint_around_some_of_the_layers_is_right_too() -> None:
    model = adapted(models.llama(layers=1))
    attention = model.model.layers[0].self_attn
    x = torch.randn(2, 3, 32, requires_grad=True)

    def run(x: Tensor) -> Tensor:
        return attention.q_proj(x).sum() + attention.k_proj(x).sum()

    expected = torch.autograd.grad(run(x), [x, attention.k_proj.lora_B])
    for _ in range(3):
        got = torch.autograd.grad(checkpoint(run, x, use_reentrant=False), [x, attention.k_proj.lora_B])
        assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))


def test_dropout_takes_one_mask_for_layers_that_share_an_input() -> None:
    model = adapted(models.llama(layers=1), dropout=0.5)
    attention = model.model.layers[0].self_attn
    for layer in (attention.q_proj, attention.k_proj):
        layer.weight.data.zero_()
        layer.lora_A.data.copy_(torch.eye(4, 32))
        layer.lora_B.data[:4] = torch.eye(4)
    x = torch.ones(50, 32)
    q, k = attention.q_proj(x)[:, :4], attention.k_proj(x)[:, :4]
    assert torch.equal(q, k)
    assert 0.3 < (q == 0).float().mean() < 0.7
    assert not torch.equal(attention.q_proj(x)[:, :4], q)  # another call, another mask


def test_second_derivatives_run_through_a_whole_model() -> None:
    model = adapted(models.llama(layers=1)).double()
    embedded = model.get_input_embeddings()(IDS).detach().requires_grad_()

    def penalty(one: nn.Module) -> Tensor:
        loss = one(inputs_embeds=embedded, labels=IDS).loss
        (grad,) = torch.autograd.grad(loss, embedded, create_graph=True)
        return grad.square().sum()

    model.config._attn_implementation = "eager"  # the fused attention has no second derivative
    assert_same(loss_and_gradients(model, penalty), loss_and_gradients(one_by_one(model), penalty))


# that nothing else changes


def test_copies_and_pickles_share_products_among_their_own_layers(counts) -> None:
    model = adapted(models.llama())
    expected = loss_and_gradients(model)
    counts.pair()
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)):
        assert_same(loss_and_gradients(other), expected)
        assert counts.pair() == (2, 2)
        attention = other.model.layers[0].self_attn
        assert attention.q_proj.lora_siblings.layers[1] is attention.k_proj


def test_names_classes_and_state_are_the_models_own() -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    plain = models.llama()
    model = adapted(models.llama())
    mlp = model.model.layers[0].mlp
    assert isinstance(mlp, LlamaMLP)
    assert type(mlp).__name__ == "LoRALlamaMLP"
    assert [n for n in model.state_dict() if "lora_" not in n] == list(plain.state_dict())
    remove(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert not any(name.startswith("lora_") for m in model.modules() for name in m.__dict__)
    assert all(torch.equal(one, other) for one, other in zip(model(IDS).logits, plain(IDS).logits, strict=True))


def test_disabled_and_merged_adapters_leave_the_bases_own_code(counts) -> None:
    model, plain = adapted(models.llama()), models.llama()
    with disabled(model), torch.no_grad():
        assert torch.equal(model(IDS).logits, plain(IDS).logits)
    expected = model(IDS).logits
    counts.pair()
    with merged(model), torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-5)
    assert counts.pair() == (0, 0)


def test_adapters_on_zero_leave_every_bit_of_the_base() -> None:
    model = inject(models.llama(), LoRAConfig(r=4))
    assert torch.equal(model(IDS).logits, models.llama()(IDS).logits)


def test_a_frozen_or_unfrozen_layer_among_its_siblings_keeps_its_say() -> None:
    model = adapted(models.llama(layers=1))
    attention = model.model.layers[0].self_attn
    attention.k_proj.lora_A.requires_grad_(False)
    attention.v_proj.weight.requires_grad_(True)
    expected = one_by_one(model)
    for one in (model, expected):
        one(input_ids=IDS, labels=IDS).loss.backward()
    assert attention.k_proj.lora_A.grad is None
    theirs = expected.model.layers[0].self_attn.v_proj.weight.grad
    torch.testing.assert_close(attention.v_proj.weight.grad, theirs, **CLOSE)


@COMPILES
def test_equal_blocks_compile_once_and_give_eager_numbers() -> None:
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    model = adapted(models.llama(layers=4))
    expected = loss_and_gradients(copy.deepcopy(model), run_without_cache)
    for block in model.model.layers:
        block.compile(fullgraph=True, backend="aot_eager")
    for _ in range(2):
        got = loss_and_gradients(model, run_without_cache)
    assert_same(got, expected)
    # of four blocks: the first block's input needs no gradient, the others' do
    assert counters["stats"]["unique_graphs"] == 2


@COMPILES
def test_a_compiled_model_validates_in_one_graph_too() -> None:
    torch._dynamo.reset()
    model = adapted(models.llama(layers=1), dropout=0.2)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    run_without_cache(compiled).backward()
    compiled.eval()
    with torch.no_grad():
        got = compiled(input_ids=IDS, use_cache=False).logits
        torch.testing.assert_close(got, one_by_one(model)(input_ids=IDS).logits, **CLOSE)


def test_a_traced_mlp_gives_the_same() -> None:
    mlp = adapted(models.llama(layers=1)).eval().model.layers[0].mlp
    x = torch.randn(2, 3, 32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing is deprecated, and says so
        traced = torch.jit.trace(mlp, (x,))
    torch.testing.assert_close(traced(x), mlp(x), **CLOSE)


def test_threads_may_run_one_model_at_the_same_time() -> None:
    model = adapted(models.llama()).eval()
    batches = [models.token_ids(2, 6 + i) for i in range(4)]
    with torch.no_grad():
        expected = [model(batch).logits for batch in batches]

    def work(index: int) -> bool:
        with torch.no_grad():
            return all(torch.allclose(model(batches[index]).logits, expected[index], atol=1e-5) for _ in range(30))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))
    assert all(
        len(layer.lora_siblings.layers) > 1 for layer in model.modules() if getattr(layer, "lora_siblings", None)
    )


def test_nothing_is_alive_after_a_step() -> None:
    model, seen = adapted(models.llama()), []
    for layer in model.model.layers:
        layer.self_attn.v_proj.register_forward_hook(
            lambda module, args, y: seen.extend(map(weakref.ref, (args[0], y)))
        )
    run_without_cache(model).backward()
    gc.collect()
    assert len(seen) == 4
    assert not any(reference() is not None for reference in seen)


def test_a_step_that_failed_between_two_siblings_leaves_nothing_behind() -> None:
    model = adapted(models.llama())
    expected = loss_and_gradients(one_by_one(model))
    handle = model.model.layers[0].self_attn.k_proj.register_forward_hook(lambda *_: 1 / 0)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            model(input_ids=IDS)
    handle.remove()
    for one in (copy.deepcopy(model), model):
        assert_same(loss_and_gradients(one), expected)


def test_the_graph_of_a_step_that_failed_is_let_go_when_the_next_one_begins() -> None:
    model, kept, alive = adapted(models.llama(layers=3)), [], []
    first, last = model.model.layers[0], model.model.layers[2]
    handles = [
        first.mlp.register_forward_hook(lambda module, args, y: kept.append(weakref.ref(args[0]))),
        last.self_attn.k_proj.register_forward_hook(lambda *_: 1 / 0),
    ]
    with pytest.raises(ZeroDivisionError):
        run_without_cache(model)
    for handle in handles:
        handle.remove()
    first.mlp.register_forward_pre_hook(lambda *_: alive.append(kept[0]() is not None))
    run_without_cache(model)
    assert alive == [False]


class Around(Three):
    """Calls two of its layers before another such module, and one after it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Three()

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x)
        a, b, c = self.inner(x)
        return q * self.k(x) * self.v(x) * a * b * c


def test_layers_around_others_that_are_computed_together_get_their_own_gradients() -> None:
    model = adapted(nn.Sequential(nn.Linear(8, 8), Around()), target_modules=["q", "k", "v"])
    x, alone, optimizer = torch.randn(3, 8), one_by_one(model), torch.optim.SGD(model.parameters(), lr=0.0)
    for _ in range(5):
        run = lambda m: m(x).square().sum()  # noqa: E731
        assert_same(loss_and_gradients(model, run), loss_and_gradients(alone, run))
        optimizer.step()


def run_without_cache(model: nn.Module) -> Tensor:
    return model(input_ids=IDS, labels=IDS, use_cache=False).loss
