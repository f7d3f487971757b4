"""Fused experts computed as one, against dense float64 math, PEFT, and transformers' own implementations."""

import copy
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
from transformers.integrations.moe import use_experts_implementation

from lightning_lora import LoRAConfig, inject, load_peft, save_peft
from lightning_lora.experts.function import lora_experts
from lightning_lora.experts.gates import KnownGate, OwnGate
from lightning_lora.experts.stacks import Stack
from lightning_lora.layers.base import lora_class
from lightning_lora.layers.experts import LoRAExperts
from lightning_lora.layers.parameters import LoRAParameters
from tests import models, zoo

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


def stack(first: int, out: int, seed: int, *, bias: bool = False, scaling: float = 1.5) -> Stack:
    shapes = [(EXPERTS, out, first), (EXPERTS, out), (EXPERTS, RANK, first), (EXPERTS, out, RANK)]
    weight, b, A, B = (noise(*shape, seed=seed + place) * 0.5 for place, shape in enumerate(shapes))
    return Stack(weight, b if bias else None, A.requires_grad_(), B.requires_grad_(), scaling)


def dense_linear(x: Tensor, layer: Stack, expert: int) -> Tensor:
    weight = layer.weight[expert]
    if layer.lora_A is not None:
        weight = weight + layer.scaling * layer.lora_B[expert] @ layer.lora_A[expert]
    return F.linear(x, weight, None if layer.bias is None else layer.bias[expert])


def dense(x: Tensor, index: Tensor, weights: Tensor, opening: Stack, closing: Stack, gate: Callable) -> Tensor:
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
    other.__class__ = lora_class(LoRAParameters, experts.lora_base_class)
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
    assert experts.lora_gates == {implementation: "own" if name == "gpt_oss" else "silu"}
    assert is_fused(experts, inputs)
    assert not is_fused(unfused(experts), inputs)
    assert_same(results(experts, inputs), results(unfused(experts), inputs))


def test_an_implementation_that_is_set_later_is_looked_at_then() -> None:
    model = adapted("mixtral", "eager")
    experts = experts_of(model)
    inputs = inputs_of(experts)
    model.set_experts_implementation("batched_mm")
    assert is_fused(experts, inputs)
    assert experts.lora_gates == {"eager": "silu", "batched_mm": "silu"}


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
    """Experts as transformers writes them, with a formula to be chosen."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.num_experts, self.act_fn = 4, nn.SiLU()
        self.gate_up_proj = nn.Parameter(noise(4, 2 * INTERMEDIATE, HIDDEN, dtype=torch.float32))
        self.down_proj = nn.Parameter(noise(4, HIDDEN, INTERMEDIATE, seed=1, dtype=torch.float32))

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for expert in range(4):
            token, choice = torch.where(index == expert)
            h = self._apply_gate(F.linear(x[token], self.gate_up_proj[expert]))
            y = y.index_add(0, token, F.linear(h, self.down_proj[expert]) * weights[token, choice, None])
        return y


class Holder(nn.Module):
    def __init__(self, experts: type[nn.Module]) -> None:
        super().__init__()
        self.config = SimpleNamespace(_experts_implementation="eager")
        self.experts = experts(self.config)


def held(experts: type[nn.Module]) -> Any:
    model = inject(Holder(experts), LoRAConfig(r=RANK, target_modules=[], target_parameters=PARAMETERS))
    models.fill_adapters(model)
    return model.experts


def test_a_custom_class_is_recognised_with_a_gate_of_its_own() -> None:
    class Own(Experts):
        def _apply_gate(self, e: Tensor) -> Tensor:
            return clamped(e)

    experts = held(use_experts_implementation(Own))
    inputs = inputs_of(experts)
    assert experts.lora_gates == {"eager": "own"}
    assert is_fused(experts, inputs)
    assert_same(results(experts, inputs), results(unfused(experts), inputs))


def test_experts_that_are_not_dispatched_are_left_alone() -> None:
    class Handwritten(Experts):
        def _apply_gate(self, e: Tensor) -> Tensor:
            return silu_gate(e)

    assert type(held(Handwritten)).__bases__[0] is LoRAParameters


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

    for experts in (Doubled, InPlace, Squared):
        assert type(held(use_experts_implementation(experts))).__bases__[0] is LoRAParameters
    assert isinstance(
        held(use_experts_implementation(type("Same", (Experts,), {"forward": Experts.forward}))), LoRAExperts
    )
