"""The functions of adapted linear layers over weights in 4 and 8 bits: derivatives of all kinds, transforms, graphs."""

import weakref
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lora.ops.gated_mlp import lora_gated_mlp
from lightning_lora.ops.linear import lora_linears
from lightning_lora.ops.linear_tensors import LinearTensors, ScaledDropout, StoredLinearTensors
from lightning_lora.ops.packed import FORMS
from lightning_lora.ops.stored import ONEDNN_ROWS, dense_linear, stored_linear

KINDS = pytest.mark.parametrize("kind", FORMS)
TERM, DROPPED = ScaledDropout(2.0), ScaledDropout(2.0, 0.3, torch.tensor(7))
TERMS = pytest.mark.parametrize("term", [TERM, DROPPED], ids=["plain", "dropout"])


def record(kind: str | None, in_features: int, out_features: int, seed: int) -> LinearTensors:
    """Return float64 tensors of a layer; its weight is packed, or with ``None`` a tensor."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(shape, generator=g, dtype=torch.float64)  # noqa: E731
    weight = draw(out_features, in_features)
    own = (
        draw(out_features).requires_grad_(),
        draw(3, in_features).requires_grad_(),
        draw(out_features, 3).requires_grad_(),
    )
    return LinearTensors(weight, *own) if kind is None else StoredLinearTensors(FORMS[kind].quantize(weight), *own)


def dense(layer: LinearTensors) -> LinearTensors:
    """Return the record with its weight as a tensor."""
    weight = layer.weight if isinstance(layer.weight, Tensor) else layer.weight.dense(torch.float64)
    return LinearTensors(weight, *layer[1:])


def math(x: Tensor, layer: LinearTensors, term: ScaledDropout) -> Tensor:
    weight, bias, A, B = dense(layer)
    entering = x if term.seed is None else x * term.mask(x, x.shape[1])
    return x @ weight.T + bias + term.factor * entering @ A.T @ B.T


def leaves(*layers: LinearTensors) -> list[Tensor]:
    return [tensor for layer in layers for tensor in layer[1:]]


def draw_x() -> Tensor:
    return torch.randn(5, 16, generator=torch.Generator().manual_seed(9), dtype=torch.float64).requires_grad_()


@KINDS
@TERMS
def test_layers_over_packed_weights_and_over_tensors_go_together(kind: str, term: ScaledDropout) -> None:
    x, layers = draw_x(), [record(kind, 16, 8, 1), record(None, 16, 12, 2), record(kind, 16, 8, 3)]
    outputs = lora_linears(x, layers, term)
    expected = [math(x, layer, term) for layer in layers]
    inputs = [x, *leaves(*layers)]
    got = torch.autograd.grad(sum(y.square().sum() for y in outputs), inputs)
    wanted = torch.autograd.grad(sum(y.square().sum() for y in expected), inputs)
    for one, other in zip([*outputs, *got], [*expected, *wanted], strict=True):
        torch.testing.assert_close(one, other)


@KINDS
@TERMS
def test_a_gated_mlp_over_packed_weights(kind: str, term: ScaledDropout) -> None:
    x, layers = draw_x(), [record(kind, 16, 24, 1), record(kind, 16, 24, 2), record(None, 24, 16, 3)]
    y = lora_gated_mlp(x, *layers, activation="silu", entering=term, leaving=TERM)
    expected = math(F.silu(math(x, layers[0], term)) * math(x, layers[1], term), layers[2], TERM)
    inputs = [x, *leaves(*layers)]
    torch.testing.assert_close(y, expected)
    got, wanted = (torch.autograd.grad(one.square().sum(), inputs) for one in (y, expected))
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other)


class Watched:
    """A weight that says how many of its kind are dense at the time that another is asked for."""

    dtype, device = torch.float64, torch.device("cpu")
    alive: ClassVar[weakref.WeakSet[Tensor]] = weakref.WeakSet()
    most: ClassVar[int] = 0

    def __init__(self, weight: Tensor) -> None:
        self.weight, self.shape = weight, weight.shape

    def dense(self, dtype: torch.dtype) -> Tensor:
        dense = self.weight.to(dtype, copy=True)
        Watched.alive.add(dense)
        Watched.most = max(Watched.most, len(Watched.alive))
        return dense


def test_one_weight_at_a_time_is_dense() -> None:
    layers = [record(None, 16, 16, seed) for seed in range(3)]
    layers = [StoredLinearTensors(Watched(layer.weight), *layer[1:]) for layer in layers]
    outputs = lora_linears(draw_x(), layers, DROPPED)
    sum(y.sum() for y in outputs).backward()
    lora_gated_mlp(draw_x(), *layers, activation="silu", entering=TERM, leaving=TERM).sum().backward()
    assert Watched.most == 1


@KINDS
def test_second_derivatives(kind: str) -> None:
    one, gated = record(kind, 16, 16, 1), [record(kind, 16, 24, 1), record(kind, 16, 24, 2), record(kind, 24, 16, 3)]

    def twice(y: Tensor, inputs: list[Tensor]) -> list[Tensor]:
        first = torch.autograd.grad(y.square().sum(), inputs, create_graph=True)
        return list(torch.autograd.grad(sum(grad.square().sum() for grad in first), inputs))

    x = draw_x()
    h, expected = lora_linears(x, [one], TERM)[0], math(x, one, TERM)
    y = lora_gated_mlp(h, *gated, activation="silu", entering=TERM, leaving=TERM)
    e, g = (math(expected, layer, TERM) for layer in gated[:2])
    inputs = [x, *leaves(one, *gated)]
    for got, wanted in zip(twice(y, inputs), twice(math(F.silu(e) * g, gated[2], TERM), inputs), strict=True):
        torch.testing.assert_close(got, wanted)


@KINDS
def test_the_base_alone_is_differentiable_twice(kind: str) -> None:
    x, layer = draw_x(), record(kind, 16, 8, 1)
    assert torch.autograd.gradcheck(lambda x, b: stored_linear(x, layer.weight, b), (x, layer.bias))
    assert torch.autograd.gradgradcheck(lambda x, b: stored_linear(x, layer.weight, b), (x, layer.bias))


@pytest.mark.parametrize("num_rows", [0, 1, ONEDNN_ROWS - 1, ONEDNN_ROWS, 3 * ONEDNN_ROWS + 5])
@pytest.mark.parametrize("has_onednn", [True, False])
def test_products_of_either_library_are_those_in_float64(
    num_rows: int, has_onednn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    g = torch.Generator().manual_seed(2)
    x, W, b = (torch.randn(shape, generator=g) for shape in ((2, num_rows, 24), (40, 24), (40,)))
    monkeypatch.setattr("lightning_lora.ops.stored._has_slow_mkl", lambda: has_onednn)
    with torch.no_grad():
        y, back = dense_linear(x, W, b), dense_linear(x, W.t().contiguous().t())
    torch.testing.assert_close(y, (x.double() @ W.double().T + b).float())
    torch.testing.assert_close(back, (x.double() @ W.double().T).float())


@KINDS
def test_many_rows_in_float32_are_differentiable_twice(kind: str) -> None:
    layer = StoredLinearTensors(
        record(kind, 16, 8, 1).weight, *(t.detach().float() for t in record(kind, 16, 8, 1)[1:])
    )
    x = torch.randn(2 * ONEDNN_ROWS, 16, generator=torch.Generator().manual_seed(3), requires_grad=True)

    def twice(y: Tensor, x: Tensor) -> Tensor:
        (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    wide = x.detach().double().requires_grad_()
    expected = twice(math(wide, layer._replace(lora_A=layer.lora_A.double(), lora_B=layer.lora_B.double()), TERM), wide)
    got = twice(lora_linears(x, [layer], TERM)[0], x)
    torch.testing.assert_close(got, expected.float(), rtol=1e-4, atol=1e-3 * float(expected.abs().max()))


@KINDS
@pytest.mark.parametrize("transform", ["func", "forward mode", "trace"])
def test_transforms(kind: str, transform: str) -> None:
    x, layer = draw_x().detach(), record(kind, 16, 8, 1)
    layer = layer._replace(bias=layer.bias.detach(), lora_A=layer.lora_A.detach(), lora_B=layer.lora_B.detach())

    plain = dense(layer)

    def ours(x: Tensor) -> Tensor:
        return lora_linears(x, [layer], TERM)[0].square() + stored_linear(x, layer.weight, None)

    def expected(x: Tensor) -> Tensor:
        return math(x, plain, TERM).square() + x @ plain.weight.T

    def run(function: Any) -> Tensor:
        if transform == "func":
            return torch.func.vmap(torch.func.jacrev(lambda row: function(row[None])[0]))(x)
        if transform == "forward mode":
            return torch.func.jvp(function, (x,), (torch.ones_like(x),))[1]
        return torch.jit.trace(function, (x,), check_trace=False)(x + 1)

    torch.testing.assert_close(run(ours), run(expected))


@KINDS
def test_autocast_makes_the_weight_dense_in_its_dtype(kind: str) -> None:
    x, layer = draw_x().float(), record(kind, 16, 8, 1)
    layer = StoredLinearTensors(layer.weight, *(tensor.detach().float() for tensor in layer[1:]))
    plain = LinearTensors(layer.weight.dense(torch.bfloat16), *layer[1:])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, expected = lora_linears(x, [layer], TERM)[0], lora_linears(x, [plain], TERM)[0]
        base = stored_linear(x, layer.weight, layer.bias)
    assert torch.equal(y, expected)
    assert torch.equal(base, F.linear(x.bfloat16(), plain.weight, layer.bias.bfloat16()))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@KINDS
def test_a_compiled_step_is_one_graph_that_keeps_no_dense_weight(kind: str) -> None:
    layers = [record(kind, 16, 8, 1), record(kind, 16, 12, 2)]
    x = draw_x()

    def run(x: Tensor) -> Tensor:
        return torch.cat(lora_linears(x, layers, TERM), dim=1).sin()

    saved: list[Tensor] = []
    torch.compiler.reset()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = torch.compile(run, backend="aot_eager", fullgraph=True)(x)
    inputs = [x, *leaves(*layers)]
    expected = torch.cat([math(x, layer, TERM) for layer in layers], dim=1).sin()
    got, wanted = (torch.autograd.grad(one.sum(), inputs) for one in (y, expected))
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other)
    assert not {(8, 16), (12, 16), (16, 8), (16, 12)} & {tuple(t.shape) for t in saved}
