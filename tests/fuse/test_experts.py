"""Fused experts computed as one, against dense float64 math, PEFT, and transformers' own implementations."""

import copy
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers import Qwen3MoeConfig
from transformers.integrations.moe import use_experts_implementation
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from lightning_lora import LoRAConfig, inject, load_peft, merge, remove, save_peft, unmerge
from lightning_lora.fuse.experts import LoRAExperts
from lightning_lora.layers.class_swap import swap_class
from lightning_lora.layers.parameters import LoRAParameters
from lightning_lora.model.disabled import disabled
from lightning_lora.ops.experts import grouped
from lightning_lora.ops.experts.function import lora_experts
from lightning_lora.ops.experts.gates import KnownGate, OwnGate
from lightning_lora.ops.experts.records import ExpertWeights
from tests import models, zoo
from tests.fuse.test_counters import saved_bytes

EXPERTS, HIDDEN, INTERMEDIATE, RANK, TOKENS, TOP_K = 6, 8, 12, 3, 10, 2
PARAMETERS = ["experts.gate_up_proj", "experts.down_proj"]
IMPLEMENTATIONS = ["eager", "batched_mm", "grouped_mm"]
EXACT = {"rtol": 1e-11, "atol": 1e-12}  # other orders of float64 operations
CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # other orders of float32 operations, in products of products


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def routing(tokens: int = TOKENS, experts: int = EXPERTS) -> tuple[Tensor, Tensor]:
    """An index in which the second expert has no rows, and weights that sum to one nowhere."""
    scores = noise(tokens, experts, seed=5).sigmoid()
    scores[:, 1] = 0
    weights, index = scores.topk(TOP_K, dim=1)
    return index, weights


def stack(first: int, out: int, seed: int, *, bias: bool = False, scaling: float = 1.5) -> ExpertWeights:
    shapes = [(EXPERTS, out, first), (EXPERTS, out), (EXPERTS, RANK, first), (EXPERTS, out, RANK)]
    weight, b, A, B = (noise(*shape, seed=seed + place) * 0.5 for place, shape in enumerate(shapes))
    return ExpertWeights(weight, b if bias else None, A.requires_grad_(), B.requires_grad_(), scaling)


def dense_linear(x: Tensor, layer: ExpertWeights, expert: int) -> Tensor:
    weight = layer.weight[expert]
    if layer.lora_A is not None:
        weight = weight + layer.scaling * layer.lora_B[expert] @ layer.lora_A[expert]
    return F.linear(x, weight, None if layer.bias is None else layer.bias[expert])


def dense(
    x: Tensor, index: Tensor, weights: Tensor, opening: ExpertWeights, closing: ExpertWeights, gate: Callable
) -> Tensor:
    """Every expert for every token, with merged weights, and the routing as a matrix."""
    share = torch.zeros(len(x), EXPERTS, dtype=x.dtype).scatter_add(1, index, weights)
    outputs = [dense_linear(gate(dense_linear(x, opening, e)), closing, e) for e in range(EXPERTS)]
    return torch.einsum("te,eth->th", share, torch.stack(outputs))


def silu_gate(e: Tensor) -> Tensor:
    a, b = e.chunk(2, dim=-1)
    return F.silu(a) * b


def clamped(e: Tensor) -> Tensor:
    a, b = e[..., ::2].clamp(max=0.7), e[..., 1::2].clamp(-0.7, 0.7)
    return (b + 1) * a * torch.sigmoid(1.7 * a)


GATES = {
    "known": (KnownGate("silu"), silu_gate, 2 * INTERMEDIATE),
    "own": (OwnGate(clamped), clamped, 2 * INTERMEDIATE),
    "no gate": (OwnGate(F.relu), F.relu, INTERMEDIATE),
}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("gate", GATES)
def test_outputs_and_all_gradients_are_those_of_merged_weights(gate: str, bias: bool) -> None:
    ours, plain, opened = GATES[gate]
    opening, closing = stack(HIDDEN, opened, 10, bias=bias), stack(INTERMEDIATE, HIDDEN, 20, bias=bias)
    index, weights = routing()
    x, weights = noise(TOKENS, HIDDEN).requires_grad_(), weights.requires_grad_()
    inputs = [x, weights, opening.lora_A, opening.lora_B, closing.lora_A, closing.lora_B]
    y = lora_experts(x, index, weights, opening, closing, ours, dtype=x.dtype)
    expected = dense(x, index, weights, opening, closing, plain)
    torch.testing.assert_close(y, expected, **EXACT)
    grad = noise(TOKENS, HIDDEN, seed=9)
    for found, wanted in zip(
        torch.autograd.grad(y, inputs, grad), torch.autograd.grad(expected, inputs, grad), strict=True
    ):
        torch.testing.assert_close(found, wanted, **EXACT)
    assert not torch.autograd.grad(
        lora_experts(x, index, weights, opening, closing, ours, dtype=x.dtype).sum(), inputs
    )[2][1].any()  # of the expert without rows


@pytest.mark.parametrize(("gate", "bias"), [("known", False), ("own", True)])
def test_second_derivatives_are_those_of_the_function(gate: str, bias: bool) -> None:
    ours, _, opened = GATES[gate]
    opening, closing = stack(HIDDEN, opened, 10, bias=bias), stack(INTERMEDIATE, HIDDEN, 20, bias=bias)
    index, weights = routing(4)

    def run(x: Tensor, w: Tensor, *factors: Tensor) -> Tensor:
        first = opening._replace(lora_A=factors[0], lora_B=factors[1])
        second = closing._replace(lora_A=factors[2], lora_B=factors[3])
        return lora_experts(x, index, w, first, second, ours, dtype=x.dtype)

    inputs = (noise(4, HIDDEN) * 0.3, weights, *opening[2:4], *closing[2:4])
    inputs = tuple(one.detach().requires_grad_() for one in inputs)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


@pytest.mark.parametrize("missing", ["opening", "closing"])
def test_one_projection_may_have_no_adapter(missing: str) -> None:
    opening, closing = stack(HIDDEN, 2 * INTERMEDIATE, 10), stack(INTERMEDIATE, HIDDEN, 20)
    if missing == "opening":
        opening = opening._replace(lora_A=None, lora_B=None)
    else:
        closing = closing._replace(lora_A=None, lora_B=None)
    index, weights = routing()
    x = noise(TOKENS, HIDDEN).requires_grad_()
    inputs = [x, *(t for s in (opening, closing) for t in (s.lora_A, s.lora_B) if t is not None)]
    y = lora_experts(x, index, weights, opening, closing, KnownGate("silu"), dtype=x.dtype)
    expected = dense(x, index, weights, opening, closing, silu_gate)
    torch.testing.assert_close(y, expected, **EXACT)
    found, wanted = (torch.autograd.grad(one.square().sum(), inputs) for one in (y, expected))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, **EXACT)


@pytest.mark.parametrize("needed", ["x", "weights", "A", "B"])
def test_gradients_come_alone(needed: str) -> None:
    """What needs none gets none, and what is then not computed is missed by nobody."""
    opening, closing = stack(HIDDEN, 2 * INTERMEDIATE, 10), stack(INTERMEDIATE, HIDDEN, 20)
    index, weights = routing()
    x = noise(TOKENS, HIDDEN)
    inputs = {"x": x, "weights": weights, "A": opening.lora_A, "B": closing.lora_B}
    for one in (opening.lora_A, opening.lora_B, closing.lora_A, closing.lora_B):
        one.requires_grad_(False)
    wanted = inputs[needed].requires_grad_()
    y = lora_experts(x, index, weights, opening, closing, KnownGate("silu"), dtype=x.dtype)
    expected = dense(x, index, weights, opening, closing, silu_gate)
    found, given = (torch.autograd.grad(one.square().sum(), wanted)[0] for one in (y, expected))
    torch.testing.assert_close(found, given, **EXACT)


def test_no_token_at_all() -> None:
    opening, closing = stack(HIDDEN, 2 * INTERMEDIATE, 10), stack(INTERMEDIATE, HIDDEN, 20)
    x = noise(0, HIDDEN).requires_grad_()
    index, weights = torch.empty(0, TOP_K, dtype=torch.long), noise(0, TOP_K)
    y = lora_experts(x, index, weights, opening, closing, KnownGate("silu"), dtype=x.dtype)
    y.sum().backward()
    assert y.shape == x.grad.shape == (0, HIDDEN)
    assert not any(factor.grad.any() for factor in (*opening[2:4], *closing[2:4]))


def test_the_graph_may_be_kept_and_gives_the_same_again() -> None:
    opening, closing = stack(HIDDEN, 2 * INTERMEDIATE, 10), stack(INTERMEDIATE, HIDDEN, 20)
    index, weights = routing()
    x = noise(TOKENS, HIDDEN).requires_grad_()
    inputs = [x, weights.requires_grad_(), *opening[2:4], *closing[2:4]]
    y = lora_experts(x, index, weights, opening, closing, KnownGate("silu"), dtype=x.dtype).square().sum()
    first = torch.autograd.grad(y, inputs, retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(y, inputs), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("rank", [8, 3])
def test_kernels_that_group_all_experts_give_what_one_by_one_gives(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On CPU, where torch has the kernels too; a device computes with them in bfloat16."""
    sizes = {"first": (2 * INTERMEDIATE, HIDDEN), "second": (HIDDEN, INTERMEDIATE)}
    stacks = []
    for seed, (out, first) in enumerate(sizes.values()):
        shapes = [(EXPERTS, out, first), (EXPERTS, rank, first), (EXPERTS, out, rank)]
        W, A, B = (noise(*shape, seed=seed + place).float() * 0.3 for place, shape in enumerate(shapes))
        stacks.append(ExpertWeights(W, None, A.requires_grad_(), B.requires_grad_(), 1.5))
    index, weights = routing()
    x, weights = noise(TOKENS, HIDDEN, dtype=torch.float32).requires_grad_(), weights.float().requires_grad_()
    inputs = [x, weights, *stacks[0][2:4], *stacks[1][2:4]]
    found = []
    for is_grouped in (False, True):
        monkeypatch.setattr(grouped, "takes", lambda *_: is_grouped)  # noqa: B023
        y = lora_experts(x, index, weights, *stacks, KnownGate("silu"), dtype=x.dtype)
        found.append([y, *torch.autograd.grad(y.square().sum(), inputs)])
    assert_same(*found)


# modules


def build(name: str, implementation: str = "grouped_mm") -> nn.Module:
    model = next(f.build for f in zoo.FAMILIES if f.name == name)()
    model.config._experts_implementation = implementation
    return model


def adapted(name: str, implementation: str = "grouped_mm") -> nn.Module:
    model = inject(
        build(name, implementation), LoRAConfig(r=RANK, alpha=6, target_modules=[], target_parameters=PARAMETERS)
    )
    models.fill_adapters(model)
    return model.train()


def experts_of(model: nn.Module) -> Any:
    return next(module for module in model.modules() if isinstance(module, LoRAParameters))


def inputs_of(experts: Any, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    index, weights = routing(experts=4)
    x = noise(TOKENS, experts.lora_A_gate_up_proj.shape[2])
    return x.to(dtype).requires_grad_(), index, weights.to(dtype).requires_grad_()


def results(experts: Any, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Return the output and the gradients of the inputs and all adapters."""
    x, index, weights = inputs
    factors = [parameter for name, parameter in experts.named_parameters() if "lora_" in name]
    y = experts(x, index, weights)
    return [y, *torch.autograd.grad(y.float().square().sum(), [x, weights, *factors])]


def unfused(experts: Any) -> Any:
    """Return a copy that runs its own code, on weights that keep their factors apart in each product."""
    other = copy.deepcopy(experts)
    swap_class(other, LoRAParameters, experts.lora_base_class)
    return other


def is_fused(experts: Any, inputs: tuple[Tensor, ...]) -> bool:
    names, todo = set(), [experts(*inputs).grad_fn]
    while todo:
        node = todo.pop()
        names.add(type(node).__name__)
        todo += [following for following, _ in node.next_functions if following is not None]
    return "_ExpertsBackward" in names


def assert_same(found: list[Tensor], wanted: list[Tensor], **tolerance: float) -> None:
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, **(tolerance or CLOSE))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "qwen2_moe", "deepseek_v3", "gpt_oss"])
def test_families_are_recognised_and_give_what_their_own_code_gives(name: str, implementation: str) -> None:
    experts = experts_of(adapted(name, implementation))
    inputs = inputs_of(experts)
    assert experts.recognised.gates == {implementation: "own" if name == "gpt_oss" else "silu"}
    assert is_fused(experts, inputs)
    assert not is_fused(unfused(experts), inputs)
    assert_same(results(experts, inputs), results(unfused(experts), inputs))


def test_an_implementation_that_is_set_later_is_looked_at_then() -> None:
    model = adapted("mixtral", "eager")
    experts = experts_of(model)
    inputs = inputs_of(experts)
    model.set_experts_implementation("batched_mm")
    assert is_fused(experts, inputs)
    assert experts.recognised.gates == {"eager": "silu", "batched_mm": "silu"}


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_three_steps_are_those_of_pefts_dense_weights(name: str, tmp_path: Path) -> None:
    settings = {"target_modules": ["q_proj"], "target_parameters": PARAMETERS}
    reference = peft.get_peft_model(build(name), peft.LoraConfig(r=RANK, lora_alpha=6, **settings))
    with torch.no_grad():
        for seed, (key, parameter) in enumerate(reference.named_parameters()):
            if "lora_" in key:
                parameter.copy_(noise(*parameter.shape, seed=seed) * 0.1)
    reference.save_pretrained(tmp_path)
    model = load_peft(build(name), tmp_path)
    batches = [models.token_ids(2, 9, seed=seed) for seed in range(3)]
    losses = []
    for trained in (reference, model):
        optimizer = torch.optim.SGD([p for p in trained.parameters() if p.requires_grad], lr=0.5)
        losses.append([])
        for batch in batches:
            loss = trained(input_ids=batch, labels=batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    assert losses[0][2] != losses[0][0]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    save_peft(model, tmp_path / "again")
    reference.save_pretrained(tmp_path / "end")
    ours, theirs = (safetensors.torch.load_file(tmp_path / d / "adapter_model.safetensors") for d in ("again", "end"))
    for key, tensor in theirs.items():
        torch.testing.assert_close(ours[key], tensor, rtol=1e-4, atol=1e-6)


# where the base's own code runs


class Experts(nn.Module):
    """Experts in a text of transformers, with a gate to be chosen."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.num_experts, self.act_fn, self.swiglu_limit = 4, nn.SiLU(), 0.7
        self.gate_up_proj = nn.Parameter(noise(4, 2 * INTERMEDIATE, HIDDEN, dtype=torch.float32))
        self.down_proj = nn.Parameter(noise(4, HIDDEN, INTERMEDIATE, seed=1, dtype=torch.float32))

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        final = torch.zeros_like(x)
        with torch.no_grad():
            mask = F.one_hot(index, num_classes=self.num_experts + 1).permute(2, 1, 0)
            hit = torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero()
        for expert_idx in hit:
            expert_idx = expert_idx[0]
            if expert_idx == self.num_experts:
                continue
            top_k_pos, token_idx = torch.where(mask[expert_idx])
            current = self._apply_gate(F.linear(x[token_idx], self.gate_up_proj[expert_idx]))
            current = F.linear(current, self.down_proj[expert_idx]) * weights[token_idx, top_k_pos, None]
            final.index_add_(0, token_idx, current.to(final.dtype))
        return final


class Holder(nn.Module):
    def __init__(self, experts: type[nn.Module]) -> None:
        super().__init__()
        self.config = SimpleNamespace(_experts_implementation="eager")
        self.experts = experts(self.config)


def held(experts: type[nn.Module]) -> Any:
    model = inject(Holder(experts), LoRAConfig(r=RANK, target_modules=[], target_parameters=PARAMETERS))
    models.fill_adapters(model)
    return model.experts


def test_a_custom_class_is_recognised_with_a_gate_in_a_text_of_transformers() -> None:
    class Own(Experts):
        def _apply_gate(self, e: Tensor) -> Tensor:
            a, b = e.chunk(2, dim=-1)
            a = a.clamp(min=None, max=self.swiglu_limit)
            b = b.clamp(min=-self.swiglu_limit, max=self.swiglu_limit)
            return F.silu(a) * b

    experts = held(use_experts_implementation(Own))
    inputs = inputs_of(experts)
    assert experts.recognised.gates == {"eager": "own"}
    assert is_fused(experts, inputs)
    assert_same(results(experts, inputs), results(unfused(experts), inputs))


def test_experts_that_are_not_dispatched_are_left_alone() -> None:
    class Handwritten(Experts):
        def _apply_gate(self, e: Tensor) -> Tensor:
            return silu_gate(e)

    assert type(held(Handwritten)).__bases__[0] is LoRAParameters


def test_a_gate_that_draws_numbers_in_training_is_left_alone() -> None:
    class Dropping(Experts):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.dropout = nn.Dropout(0.5)

        def _apply_gate(self, e: Tensor) -> Tensor:
            return self.dropout(silu_gate(e))

    model = Holder(use_experts_implementation(Dropping)).eval()
    before = torch.get_rng_state()
    inject(model, LoRAConfig(r=RANK, target_modules=[], target_parameters=PARAMETERS))
    assert type(model.experts).__bases__[0] is LoRAParameters  # in backward it would drop others
    assert torch.equal(torch.get_rng_state(), before)


def test_another_formula_is_left_alone() -> None:
    class Doubled(Experts):
        def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
            return 2 * super().forward(x, index, weights)

    class InPlace(Experts):
        def _apply_gate(self, e: Tensor) -> Tensor:
            return silu_gate(e.mul_(0.5))

    class Squared(Experts):  # its weights enter squared
        def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
            return super().forward(x, index, weights.square())

    class Unknown(Experts):
        def _apply_gate(self, e: Tensor) -> Tensor:
            return clamped(e)

    class Random(Experts):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.act_fn = nn.RReLU()

    for experts in (Doubled, InPlace, Squared, Unknown, Random):
        assert type(held(use_experts_implementation(experts))).__bases__[0] is LoRAParameters
    assert isinstance(
        held(use_experts_implementation(type("Same", (Experts,), {"forward": Experts.forward}))), LoRAExperts
    )


def change(experts: Any, how: str) -> Any:
    """Do what keeps experts from being computed as one; return what undoes it."""
    if how == "a hook on the activation":
        return experts.act_fn.register_forward_hook(lambda *_: None).remove
    if how == "a hook on all modules":
        return nn.modules.module.register_module_forward_hook(lambda *_: None).remove
    if how == "a base that trains":
        experts._parameters["down_proj"].requires_grad_(True)
    else:
        experts._is_expert_parallel = True
    return lambda: None


@pytest.mark.parametrize(
    "how",
    ["a hook on the activation", "a hook on all modules", "a base that trains", "experts spread over ranks"],
)
def test_the_bases_own_code_runs_with(how: str) -> None:
    experts = experts_of(adapted("qwen3_moe", "eager"))
    inputs = inputs_of(experts)
    expected = results(experts, inputs)
    undo = change(experts, how)
    try:
        assert not is_fused(experts, inputs)
        assert_same(results(experts, inputs), expected)
        if how == "a base that trains":
            experts(*inputs).sum().backward()
            assert experts._parameters["down_proj"].grad.any()
    finally:
        undo()


def test_hooks_on_the_activation_and_on_the_experts_see_what_they_should() -> None:
    experts = experts_of(adapted("qwen3_moe"))
    inputs = inputs_of(experts)
    seen: dict[str, tuple[int, ...]] = {}
    experts.register_forward_hook(lambda module, args, y: seen.update(experts=tuple(y.shape)))
    experts.register_full_backward_hook(lambda module, grads, _: seen.update(grad=tuple(grads[0].shape)))
    assert is_fused(experts, inputs)
    experts.act_fn.register_forward_hook(lambda module, args, y: seen.update(activation=tuple(y.shape)))
    experts(*inputs).sum().backward()
    assert seen == {"experts": (TOKENS, 32), "activation": (TOKENS * TOP_K, 16), "grad": (TOKENS, 32)}


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_gives_the_same(reentrant: bool) -> None:
    experts = experts_of(adapted("qwen3_moe"))
    x, index, weights = inputs_of(experts)
    gradients = []
    for call in (experts, lambda *args: checkpoint(experts, *args, use_reentrant=reentrant)):
        for tensor in (x, weights, *experts.parameters()):
            tensor.grad = None
        call(x, index, weights).square().sum().backward()
        gradients.append([x.grad, weights.grad, experts.lora_A_gate_up_proj.grad, experts.lora_B_down_proj.grad])
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_autocast_is_followed_as_the_implementation_follows_it(implementation: str) -> None:
    experts = experts_of(adapted("qwen3_moe", implementation))
    inputs = inputs_of(experts)
    with torch.autocast("cpu", torch.bfloat16):
        assert is_fused(experts, inputs)
        found, wanted = results(experts, inputs), results(unfused(experts), inputs)
    assert found[0].dtype == torch.float32
    exact = results(experts, inputs)
    is_float32 = torch.allclose(found[0], exact[0], rtol=1e-5, atol=1e-6)
    assert is_float32 == (implementation == "grouped_mm")
    for one, theirs, true in zip(found, wanted, exact, strict=True):
        assert one.dtype == true.dtype
        # bfloat16 keeps 8 bits of every number on the way; the two ways round at different places
        assert (one - true).norm() <= 1.5 * (theirs - true).norm() + 1e-5 * true.norm()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16_is_as_exact_as_the_implementation(implementation: str) -> None:
    experts = experts_of(adapted("qwen3_moe", implementation))
    exact = results(experts, inputs_of(experts))
    experts.bfloat16()
    inputs = tuple(t.bfloat16().detach().requires_grad_() if t.is_floating_point() else t for t in inputs_of(experts))
    assert experts.lora_A_down_proj.dtype == torch.float32
    assert is_fused(experts, inputs)
    found, theirs = results(experts, inputs), results(unfused(experts), inputs)
    assert [one.dtype for one in found] == [one.dtype for one in theirs]
    for one, other, true in zip(found, theirs, exact, strict=True):
        # weights and inputs were rounded to 8 bits; what ours adds to that is no more than what theirs does
        assert (one.float() - true).norm() <= 1.2 * (other.float() - true).norm()


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_no_gradient_is_wanted(name: str) -> None:
    model = adapted(name)
    experts, ids = experts_of(model), models.token_ids()
    expected = model(ids).logits
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            torch.testing.assert_close(model(ids).logits, expected, rtol=1e-6, atol=1e-7)
    assert experts.recognised.gates


def test_merging_disabling_copying_and_removing() -> None:
    base = build("qwen3_moe")
    model, ids = adapted("qwen3_moe").eval(), models.token_ids()
    expected = model(ids).logits
    merge(model)
    torch.testing.assert_close(model(ids).logits, expected, **CLOSE)
    unmerge(model)
    assert torch.equal(model(ids).logits, expected)
    with disabled(model):
        torch.testing.assert_close(model(ids).logits, base(ids).logits, **CLOSE)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert isinstance(experts_of(again), LoRAExperts)
        assert torch.equal(again(ids).logits, expected)
    state = {key for key in model.state_dict() if "experts.lora_" in key and "layers.0" in key}
    assert state == {f"model.layers.0.mlp.experts.lora_{f}_{p}" for f in "AB" for p in ("gate_up_proj", "down_proj")}
    remove(model)
    assert type(model.model.layers[0].mlp.experts) is type(base.model.layers[0].mlp.experts)
    assert not [name for name in model.model.layers[0].mlp.experts.__dict__ if name.startswith("lora_")]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_compiled_in_one_graph(implementation: str) -> None:
    experts = experts_of(adapted("qwen3_moe", implementation))
    inputs = inputs_of(experts)
    expected = results(experts, inputs)
    torch._dynamo.reset()
    compiled = torch.compile(experts, backend="aot_eager", fullgraph=True)
    y = compiled(*inputs)
    torch.testing.assert_close(y, expected[0], **CLOSE)
    x, _, weights = inputs
    found = torch.autograd.grad(y.square().sum(), [x, weights, experts.lora_A_gate_up_proj])
    assert_same(list(found), [*expected[1:3], expected[3]])


def test_function_transforms_and_traces_run_the_bases_own_code() -> None:
    experts = experts_of(adapted("qwen3_moe", "batched_mm"))
    x, index, weights = (tensor.detach() for tensor in inputs_of(experts))
    expected = results(experts, (x.requires_grad_(), index, weights.requires_grad_()))
    x, weights = x.detach(), weights.detach()

    def loss(x: Tensor) -> Tensor:
        return experts(x, index, weights).square().sum()

    torch.testing.assert_close(torch.func.grad(loss)(x), expected[1], **CLOSE)
    per_batch = torch.func.vmap(lambda x: experts(x, index, weights))(torch.stack([x, x]))
    torch.testing.assert_close(per_batch[1], expected[0], **CLOSE)
    direction = noise(*x.shape, seed=3, dtype=x.dtype)
    _, forward = torch.func.jvp(loss, (x,), (direction,))
    torch.testing.assert_close(forward, (direction * expected[1]).sum(), **CLOSE)
    exported = torch.export.export(experts, (x, index, weights)).module()
    torch.testing.assert_close(exported(x, index, weights), expected[0], **CLOSE)


# what a step costs: the figures repeat on any machine


def mixture(hidden: int = 128, intermediate: int = 48, experts: int = 8) -> tuple[nn.Module, Tensor]:
    """A router and its experts in the proportions of Qwen3-30B-A3B's, and tokens for them."""
    config = Qwen3MoeConfig(
        hidden_size=hidden, moe_intermediate_size=intermediate, num_experts=experts, num_experts_per_tok=4
    )
    config._experts_implementation = "grouped_mm"
    torch.manual_seed(0)
    block = Qwen3MoeSparseMoeBlock(config)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.05)
    return block, torch.randn(1, 64, hidden, requires_grad=True)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_mixture_keeps_at_most_half_of_what_peft_keeps(implementation: str) -> None:
    base, x = mixture()
    base.experts.config._experts_implementation = implementation
    settings = {"target_modules": [], "target_parameters": PARAMETERS}
    kept = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT on a bare block, which has no config
        theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=RANK, **settings)).base_model.model
    for name, block in (("PEFT", theirs), ("ours", inject(base, LoRAConfig(r=RANK, **settings)))):
        kept[name] = saved_bytes(lambda block=block: block(x), block.parameters())
    assert kept["ours"] <= 0.35 * kept["PEFT"]


def test_what_experts_keep_is_their_input_what_opens_them_and_ranks() -> None:
    base, x = mixture()
    block = inject(base, LoRAConfig(r=RANK, target_modules=[], target_parameters=PARAMETERS))
    tokens, hidden = x[0].detach().requires_grad_(), 128
    index = torch.rand(64, 8).topk(4, dim=1)[1]
    weights = torch.rand(64, 4, requires_grad=True)
    rows = 64 * 4
    kept = saved_bytes(lambda: block.experts(tokens, index, weights), block.parameters())
    assert kept == 4 * (64 * hidden + rows * (2 * 48 + 2 * RANK + 1)) + 8 * 2 * rows + 4 * 8  # order, places and ends


def test_nothing_as_large_as_the_weights_is_made() -> None:
    base, x = mixture()
    block = inject(base, LoRAConfig(r=RANK, target_modules=[], target_parameters=PARAMETERS))
    smallest = block.experts._parameters["down_proj"].numel()
    made: list[tuple[str, int]] = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and not func.is_view:
                made.append((func._schema.name, result.numel()))
            return result

    with Sizes():
        block(x).sum().backward()
    assert max(size for _, size in made) < smallest
    assert len([name for name, _ in made if name in ("aten::mm", "aten::addmm_")]) <= 8 * (4 + 12) + 4
