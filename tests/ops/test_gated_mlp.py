"""Siblings and gated MLPs as one function each: against float64 dense math, and against one layer at a time."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_lora.ops import gated_mlp as fused
from lightning_lora.ops.dropout import keep_mask
from lightning_lora.ops.gated_mlp import ACTIVATIONS, lora_gated_mlp
from lightning_lora.ops.linear import lora_linear, lora_linears
from lightning_lora.ops.linear_tensors import LinearTensors, ScaledDropout

HIDDEN, INNER, TOKENS = 6, 5, 7
OUTS, RANKS = (5, 4, 5), (2, 3, 2)
SCALING = 1.5
FLOAT32 = {"rtol": 1e-5, "atol": 2e-5}  # products of up to 40 terms of size about 1, twice in a row
FLOAT64 = {"rtol": 1e-11, "atol": 1e-11}  # the order of additions differs
# torch's own tracing of an autograd.Function builds one
COMPILES = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


def factors(in_features: int, out_features: int, r: int, seed: int, dtype=torch.float64, *, bias=True) -> LinearTensors:
    generator = torch.Generator().manual_seed(seed)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    own = leaf(out_features) if bias else None
    return LinearTensors(leaf(out_features, in_features), own, leaf(r, in_features), leaf(out_features, r))


def siblings(dtype=torch.float64) -> list[LinearTensors]:
    sizes = zip(OUTS, RANKS, strict=True)
    return [factors(HIDDEN, out, r, seed, dtype, bias=seed != 1) for seed, (out, r) in enumerate(sizes)]


def mlp(dtype=torch.float64) -> tuple[LinearTensors, LinearTensors, LinearTensors]:
    return (
        factors(HIDDEN, INNER, 2, 0, dtype),
        factors(HIDDEN, INNER, 3, 1, dtype, bias=False),
        factors(INNER, HIDDEN, 2, 2, dtype),
    )


def inputs(dtype=torch.float64, shape=(TOKENS, HIDDEN)) -> Tensor:
    return (
        torch.randn(shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(dtype).requires_grad_()
    )


def leaves(layers) -> list[Tensor]:
    return [tensor for layer in layers for tensor in layer if tensor is not None]


def mask(term: ScaledDropout, rows: int, columns: int) -> Tensor | float:
    if term.seed is None or not term.dropout:
        return 1.0
    kept = keep_mask(term.seed, torch.empty(rows, columns), term.dropout) == 1
    return kept.double() / (1 - term.dropout)


def dense(x: Tensor, layer: LinearTensors, term: ScaledDropout) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    y = rows @ layer.weight.T + term.scaling * ((rows * mask(term, *rows.shape)) @ layer.lora_A.T) @ layer.lora_B.T
    y = y if layer.bias is None else y + layer.bias
    return y.view(*x.shape[:-1], layer.lora_B.shape[0])


def dense_mlp(
    x: Tensor,
    gate: LinearTensors,
    up: LinearTensors,
    down: LinearTensors,
    activation,
    entering: ScaledDropout,
    leaving: ScaledDropout,
) -> Tensor:
    h = ACTIVATIONS[activation].forward(dense(x, gate, entering)) * dense(x, up, entering)
    return dense(h, down, leaving)


def gradients(outputs: list[Tensor], wanted: list[Tensor], **options) -> list[Tensor | None]:
    """The gradients of a loss that weighs each entry of each output differently."""
    total = sum((y * torch.arange(1, y.numel() + 1, dtype=y.dtype).cos().view(y.shape)).sum() for y in outputs)
    return list(torch.autograd.grad(total, wanted, **options))


def in_float64(layers) -> list[LinearTensors]:
    return [
        LinearTensors(*(None if t is None else t.detach().double().requires_grad_() for t in layer)) for layer in layers
    ]


def assert_all_close(got, expected, **tolerance) -> None:
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one.double(), other.double(), **tolerance)


TERMS = {"no dropout": ScaledDropout(SCALING), "dropout": ScaledDropout(SCALING, 0.4, torch.tensor(3))}


@pytest.mark.parametrize("term", TERMS.values(), ids=TERMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(HIDDEN,), (2, 3, HIDDEN), (0, HIDDEN)], ids=str)
def test_siblings_equal_dense_math_in_outputs_and_all_gradients(shape, dtype, term) -> None:
    layers, x = siblings(dtype), inputs(dtype, shape)
    outputs = lora_linears(x, layers, term)
    double, wide = in_float64(layers), x.detach().double().requires_grad_()
    expected = [dense(wide, layer, term) for layer in double]
    tolerance = FLOAT32 if dtype == torch.float32 else FLOAT64
    assert_all_close(outputs, expected, **tolerance)
    got = gradients(outputs, [x, *leaves(layers)])
    assert_all_close(got, gradients(expected, [wide, *leaves(double)]), **tolerance)


@pytest.mark.parametrize(
    "leaving", [ScaledDropout(0.7), ScaledDropout(0.7, 0.3, torch.tensor(5))], ids=["plain", "dropout"]
)
@pytest.mark.parametrize("entering", TERMS.values(), ids=TERMS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_gated_mlp_equals_dense_math_in_output_and_all_gradients(activation, entering, leaving) -> None:
    layers, x = mlp(), inputs(shape=(2, 3, HIDDEN))
    y = lora_gated_mlp(x, *layers, activation=activation, entering=entering, leaving=leaving)
    expected = dense_mlp(x, *layers, activation, entering, leaving)
    assert_all_close([y], [expected], **FLOAT64)
    wanted = [x, *leaves(layers)]
    assert_all_close(gradients([y], wanted), gradients([expected], wanted), **FLOAT64)


def test_no_tokens_and_one_token_pass_a_gated_mlp() -> None:
    layers = mlp()
    for shape in ((0, HIDDEN), (HIDDEN,)):
        x = inputs(shape=shape)
        y = lora_gated_mlp(x, *layers, activation="silu", entering=TERMS["dropout"], leaving=ScaledDropout(1.0))
        assert y.shape == shape
        assert all(torch.isfinite(g).all() for g in gradients([y], [x, *leaves(layers)]))


@pytest.mark.parametrize("term", TERMS.values(), ids=TERMS)
def test_first_and_second_derivatives_of_siblings_pass_gradcheck(term) -> None:
    layers, x = siblings(), inputs(shape=(3, HIDDEN))
    function = lambda *_: lora_linears(x, layers, term)  # noqa: E731
    assert torch.autograd.gradcheck(function, (x, *leaves(layers)))
    assert torch.autograd.gradgradcheck(function, (x, *leaves(layers)))


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "gelu"])
def test_first_and_second_derivatives_of_a_gated_mlp_pass_gradcheck(activation) -> None:
    layers, x = mlp(), inputs(shape=(3, HIDDEN))
    leaving = ScaledDropout(0.7, 0.3, torch.tensor(5))
    function = lambda *_: lora_gated_mlp(  # noqa: E731
        x, *layers, activation=activation, entering=TERMS["dropout"], leaving=leaving
    )
    assert torch.autograd.gradcheck(function, (x, *leaves(layers)))
    assert torch.autograd.gradgradcheck(function, (x, *leaves(layers)))


def calls(x: Tensor, terms) -> dict:
    entering, leaving = terms
    three, gated = siblings(), mlp()
    return {
        "siblings": (lambda: lora_linears(x, three, entering), three),
        "mlp": (lambda: (lora_gated_mlp(x, *gated, activation="silu", entering=entering, leaving=leaving),), gated),
    }


@pytest.mark.parametrize("which", ["siblings", "mlp"])
def test_a_second_backward_adds_the_same_again_and_overwrites_nothing(which) -> None:
    x = inputs()
    function, layers = calls(x, (TERMS["dropout"], ScaledDropout(0.7, 0.3, torch.tensor(5))))[which]
    outputs = function()
    before = [t.detach().clone() for t in (x, *leaves(layers), *outputs)]
    wanted = [x, *leaves(layers)]
    given = [torch.randn_like(y) for y in outputs]
    before += [grad.clone() for grad in given]
    first = torch.autograd.grad(outputs, wanted, given, retain_graph=True)
    second = torch.autograd.grad(outputs, wanted, given)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    assert all(torch.equal(t, kept) for t, kept in zip((x, *leaves(layers), *outputs, *given), before, strict=True))


@pytest.mark.parametrize("which", ["siblings", "mlp"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_every_set_of_leaves_that_train_gets_its_own_gradients(which, dropout) -> None:
    terms = (ScaledDropout(SCALING, dropout, torch.tensor(3)), ScaledDropout(0.7, dropout, torch.tensor(5)))
    x = inputs()
    function, layers = calls(x, terms)[which]
    everything = [x, *leaves(layers)]
    expected = dict(zip(map(id, everything), gradients(function(), everything), strict=True))
    kinds = {"x": [x], **{name: [getattr(layer, name) for layer in layers] for name in LinearTensors._fields}}
    for chosen in itertools.chain.from_iterable(itertools.combinations(kinds, n) for n in range(1, 5)):
        trained = [t for kind in chosen for t in kinds[kind] if t is not None]
        for tensor in everything:
            tensor.requires_grad_(any(tensor is one for one in trained))
        for tensor, grad in zip(trained, gradients(function(), trained), strict=True):
            torch.testing.assert_close(grad, expected[id(tensor)], **FLOAT64)


def test_an_output_outside_the_loss_gives_its_layer_no_gradient_and_the_others_theirs() -> None:
    layers, x = siblings(), inputs()
    outputs = lora_linears(x, layers, TERMS["dropout"])
    wanted = [x, *leaves(layers[::2])]
    got = gradients([outputs[0], outputs[2]], [*wanted, *leaves(layers[1:2])], allow_unused=True)
    expected = gradients([dense(x, layer, TERMS["dropout"]) for layer in layers[::2]], wanted)
    assert_all_close(got[: len(wanted)], expected, **FLOAT64)
    assert got[len(wanted) :] == [None] * 3


def test_an_output_may_be_changed_in_place() -> None:
    layers, x = siblings(), inputs()
    first, *_ = lora_linears(x, layers, ScaledDropout(SCALING))
    y = lora_gated_mlp(x, *mlp(), activation="silu", entering=ScaledDropout(1.0), leaving=ScaledDropout(1.0))
    expected = gradients([dense(x, layers[0], ScaledDropout(SCALING)).relu()], [x])
    assert_all_close(gradients([first.relu_()], [x]), expected, **FLOAT64)
    y.mul_(2).sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_where_single_layers_round(dtype) -> None:
    term, (gate, up, down), x = ScaledDropout(SCALING), mlp(dtype), inputs(dtype)
    y = lora_gated_mlp(x, gate, up, down, activation="silu", entering=term, leaving=term)
    e, g = (lora_linear(x, *layer, scaling=SCALING) for layer in (gate, up))
    expected = lora_linear(F.silu(e) * g, *down, scaling=SCALING)
    assert torch.equal(y, expected)
    wanted = [x, *leaves((gate, up, down))]
    eps = torch.finfo(dtype).eps  # dx is one sum instead of two that are rounded and added
    for one, other in zip(gradients([y], wanted), gradients([expected], wanted), strict=True):
        torch.testing.assert_close(one, other, rtol=8 * eps, atol=8 * eps * other.abs().max().item())


def test_float32_adapters_on_a_bfloat16_base_get_float32_gradients() -> None:
    layers = [
        LinearTensors(*(t if t is None or i < 2 else t.detach().float().requires_grad_() for i, t in enumerate(layer)))
        for layer in siblings(torch.bfloat16)
    ]
    x = inputs(torch.bfloat16)
    outputs = lora_linears(x, layers, ScaledDropout(SCALING))
    got = gradients(outputs, [x, *(t for layer in layers for t in (layer.lora_A, layer.lora_B))])
    assert [g.dtype for g in got] == [torch.bfloat16] + [torch.float32] * 6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_its_dtype_and_gradients_keep_theirs(dtype) -> None:
    term, (gate, up, down), x = ScaledDropout(SCALING), mlp(torch.float32), inputs(torch.float32)
    with torch.autocast("cpu", dtype=dtype):
        y = lora_gated_mlp(x, gate, up, down, activation="silu", entering=term, leaving=term)
        e, g = (lora_linear(x, *layer, scaling=SCALING) for layer in (gate, up))
        expected = lora_linear(F.silu(e) * g, *down, scaling=SCALING)
        many = lora_linears(x, [gate, up], term)
    assert y.dtype == many[0].dtype == dtype
    assert torch.equal(y, expected)
    assert all(torch.equal(one, other) for one, other in zip(many, (e, g), strict=True))
    assert {g.dtype for g in gradients([y], [x, *leaves((gate, up, down))])} == {torch.float32}


@pytest.mark.parametrize("which", ["siblings", "mlp"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_the_order_that_gpus_take_gives_the_same_numbers(which, dropout, monkeypatch) -> None:
    terms = (ScaledDropout(SCALING, dropout, torch.tensor(3)), ScaledDropout(0.7, dropout, torch.tensor(5)))
    x = inputs()
    function, layers = calls(x, terms)[which]
    wanted = [x, *leaves(layers)]
    expected = [*function(), *gradients(function(), wanted)]
    monkeypatch.setattr("lightning_lora.ops.products.ADAPTER_FIRST", {"cpu"})
    assert_all_close([*function(), *gradients(function(), wanted)], expected, **FLOAT64)
    x1 = inputs()
    one = siblings()[0]
    y = lora_linear(x1, *one, scaling=SCALING)
    assert_all_close(
        gradients([y], [x1, *one]), gradients([dense(x1, one, ScaledDropout(SCALING))], [x1, *one]), **FLOAT64
    )


def test_functional_transforms_differentiate_both() -> None:
    three, gated = siblings(), mlp()

    def loss(x: Tensor) -> Tensor:
        y = lora_gated_mlp(x, *gated, activation="silu", entering=ScaledDropout(SCALING), leaving=ScaledDropout(0.7))
        return sum(one.square().sum() for one in lora_linears(y, three, ScaledDropout(SCALING)))

    x = inputs()
    got = torch.func.grad(loss)(x.detach())
    torch.testing.assert_close(got, torch.autograd.grad(loss(x), x)[0], **FLOAT64)


@COMPILES
def test_both_compile_in_one_graph_without_a_second_one_for_other_values() -> None:
    x, three, gated = inputs(torch.float32), siblings(torch.float32), mlp(torch.float32)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(x: Tensor) -> Tensor:
        y = lora_gated_mlp(x, *gated, activation="silu", entering=ScaledDropout(SCALING), leaving=ScaledDropout(0.7))
        return torch.cat(lora_linears(y, three, ScaledDropout(SCALING)), -1)

    wanted = [x, *leaves(gated), *leaves(three)]
    expected = dense_mlp(x, *gated, "silu", ScaledDropout(SCALING), ScaledDropout(0.7))
    expected = torch.cat([dense(expected, layer, ScaledDropout(SCALING)) for layer in three], -1)
    assert_all_close(
        gradients([compiled(x)], wanted), gradients([expected], wanted), rtol=1e-4, atol=1e-4
    )  # float32, three products deep


# what is kept for backward, and how many kernels run


def saved_numbers(function, known) -> int:
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        outputs = function()
    addresses = {t.untyped_storage().data_ptr() for t in known}
    found = sum(t.untyped_storage().nbytes() // t.element_size() for a, t in kept.items() if a not in addresses)
    del outputs
    return found


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_siblings_keep_their_input_once_and_r_numbers_per_token(dropout) -> None:
    layers, x, seed = siblings(), inputs(), torch.tensor(3)
    got = saved_numbers(lambda: lora_linears(x, layers, ScaledDropout(SCALING, dropout, seed)), [*leaves(layers), seed])
    assert got == TOKENS * (HIDDEN + sum(RANKS))


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_a_gated_mlp_keeps_its_input_and_two_inner_activations(dropout) -> None:
    layers, x, seeds = mlp(), inputs(), [torch.tensor(3), torch.tensor(5)]
    terms = {"entering": ScaledDropout(SCALING, dropout, seeds[0]), "leaving": ScaledDropout(0.7, dropout, seeds[1])}
    got = saved_numbers(lambda: lora_gated_mlp(x, *layers, activation="silu", **terms), [*leaves(layers), *seeds])
    assert got == TOKENS * (HIDDEN + 2 * INNER + 2 + 3 + 2)


class Kernels(TorchDispatchMode):
    """Names of the operators that touch elements."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        if not (func.is_view or name in ("empty", "new_empty", "_unsafe_view")):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def test_q_k_v_take_8_kernels_forward_and_12_backward() -> None:
    layers, x = siblings(), inputs()
    frozen = [layer._replace(weight=layer.weight.detach(), bias=None) for layer in layers]
    with Kernels() as forward:
        outputs = lora_linears(x, frozen, ScaledDropout(SCALING))
    # the A's put together, their product, and two products for each layer
    assert sorted(forward.names) == sorted(["cat", "mm", *["mm", "addmm_"] * 3])
    grads = [torch.ones_like(y) for y in outputs]
    wanted = [x, *(t for layer in frozen for t in (layer.lora_A, layer.lora_B))]
    with Kernels() as backward:
        torch.autograd.grad(outputs, wanted, grads)
    # dy B of each, one dx of four addends, one dA for all, dB of each
    expected = ["mm.out"] * 3 + ["cat", "mm", "addmm_", "addmm_", "addmm_", "addmm"] + ["addmm"] * 3
    assert sorted(name.replace("mm.out", "mm") for name in backward.names) == sorted(
        name.replace("mm.out", "mm") for name in expected
    )


def test_the_activations_of_a_module_are_the_ones_of_torch() -> None:
    e = torch.randn(50, dtype=torch.float64, requires_grad=True)
    for activation in fused.ACTIVATIONS.values():
        y = activation.forward(e)
        grad = torch.randn_like(y)
        (expected,) = torch.autograd.grad(y, e, grad)
        with torch.no_grad():
            torch.testing.assert_close(activation.backward_into(torch.empty_like(e), grad, e), expected, **FLOAT64)
