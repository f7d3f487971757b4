"""The tensor math against float64 dense products, and what it keeps for backward."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_lora import LoRAConfig, inject, merge
from lightning_lora.ops.dropout import keep_mask
from lightning_lora.ops.linear import lora_linear
from lightning_lora.ops.weights import merged_weight

IN, OUT, R, SCALING = 6, 5, 3, 1.5
# torch's own tracing of an autograd.Function builds one
COMPILES = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
SHAPES = [(IN,), (4, IN), (2, 3, IN), (2, 3, 4, IN), (0, IN), (3, 0, IN), (1, 1, IN)]
# float32 products of up to 30 terms of size about 1: a few dozen units in the last place
FLOAT32 = {"rtol": 1e-5, "atol": 1e-5}


def tensors(shape=(4, IN), dtype=torch.float64, grad=("x", "weight", "bias", "lora_A", "lora_B")) -> dict[str, Tensor]:
    sizes = {"x": shape, "weight": (OUT, IN), "bias": (OUT,), "lora_A": (R, IN), "lora_B": (OUT, R)}
    generator = torch.Generator().manual_seed(0)
    made = {name: torch.randn(size, generator=generator, dtype=torch.float64).to(dtype) for name, size in sizes.items()}
    return {name: tensor.requires_grad_(name in grad) for name, tensor in made.items()}


def dense(x, weight, bias, lora_A, lora_B, mask=None, dropout=0.0) -> Tensor:
    """The formula in its plain form; ``mask`` is 1 where an entry of x is kept."""
    on_adapter = x if mask is None else x * mask / (1 - dropout)
    y = SCALING * (on_adapter @ lora_A.T) @ lora_B.T
    if weight is not None:
        y = y + x @ weight.T
    return y if bias is None else y + bias


def outputs_and_gradients(function, inputs: dict[str, Tensor | None]) -> dict[str, Tensor]:
    """The output, and the gradients of a loss that weighs each of its entries differently."""
    leaves = {name: t.detach().clone().requires_grad_(t.requires_grad) for name, t in inputs.items() if t is not None}
    y = function(*(leaves.get(name) for name in ("x", "weight", "bias", "lora_A", "lora_B")))
    weights = torch.arange(1, y.numel() + 1, dtype=torch.float64).cos().view(y.shape).to(y.dtype)
    wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    gradients = torch.autograd.grad((y * weights).sum(), list(wanted.values())) if wanted else ()
    return {"y": y.detach(), **dict(zip(wanted, gradients, strict=True))}


def in_float64(inputs: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    return {n: None if t is None else t.detach().double().requires_grad_(t.requires_grad) for n, t in inputs.items()}


def assert_equal_all(got: dict[str, Tensor], expected: dict[str, Tensor], **tolerance: float) -> None:
    assert got.keys() == expected.keys()
    for name, value in got.items():
        assert value.shape == expected[name].shape, name
        torch.testing.assert_close(
            value.double(), expected[name].double(), msg=lambda m, n=name: f"{n}: {m}", **tolerance
        )


def ours(x, weight, bias, lora_A, lora_B, **settings) -> Tensor:
    return lora_linear(x, weight, bias, lora_A, lora_B, scaling=SCALING, **settings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_output_and_all_gradients_equal_dense_math(shape, dtype) -> None:
    inputs = tensors(shape, dtype)
    got = outputs_and_gradients(ours, inputs)
    expected = outputs_and_gradients(dense, in_float64(inputs))
    assert all(value.dtype == dtype for value in got.values())
    # float64: the order of additions differs
    assert_equal_all(got, expected, **(FLOAT32 if dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-12}))


@pytest.mark.parametrize("missing", [("bias",), ("weight", "bias")], ids=str)
def test_without_bias_or_weight_the_rest_is_the_same(missing) -> None:
    inputs = {**tensors(dtype=torch.float32), **dict.fromkeys(missing)}
    got = outputs_and_gradients(ours, inputs)
    assert_equal_all(got, outputs_and_gradients(dense, in_float64(inputs)), **FLOAT32)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("bits", range(32))
def test_every_combination_of_gradients_wanted(bits, dropout) -> None:
    names = ("x", "weight", "bias", "lora_A", "lora_B")
    inputs = tensors(grad=tuple(name for i, name in enumerate(names) if bits >> i & 1))
    seed = torch.tensor(11)
    mask = keep_mask(seed, torch.empty(4, IN, dtype=torch.float64), dropout) if dropout else None
    got = outputs_and_gradients(lambda *a: ours(*a, dropout=dropout, seed=seed), inputs)
    expected = outputs_and_gradients(lambda *a: dense(*a, mask=mask, dropout=dropout), inputs)
    assert_equal_all(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dropout_equals_the_dense_formula_with_the_same_mask(shape) -> None:
    inputs, seed, dropout = tensors(shape, torch.float32), torch.tensor(3), 0.3
    rows = inputs["x"].reshape(-1, IN).shape[0]
    mask = keep_mask(seed, torch.empty(rows, IN, dtype=torch.float64), dropout).view(shape)
    got = outputs_and_gradients(lambda *a: ours(*a, dropout=dropout, seed=seed), inputs)
    expected = outputs_and_gradients(lambda *a: dense(*a, mask=mask, dropout=dropout), in_float64(inputs))
    assert_equal_all(got, expected, **FLOAT32)


def test_no_seed_or_no_probability_means_no_dropout() -> None:
    inputs = list(tensors().values())
    plain = ours(*inputs)
    assert torch.equal(ours(*inputs, dropout=0.5), plain)
    assert torch.equal(ours(*inputs, dropout=0.0, seed=torch.tensor(1)), plain)


def test_base_product_is_bitwise_the_layers_own_when_b_is_zero() -> None:
    inputs = tensors((2, 3, IN), torch.float32)
    inputs["lora_B"] = torch.zeros(OUT, R)
    y = ours(**inputs)
    assert torch.equal(y, F.linear(inputs["x"], inputs["weight"], inputs["bias"]))


@pytest.mark.parametrize(
    ("base", "adapter"), [("bfloat16", "float32"), ("bfloat16", "bfloat16"), ("float16", "float32")]
)
def test_half_precision_keeps_each_tensors_dtype_and_stays_within_its_rounding(base, adapter) -> None:
    base, adapter = getattr(torch, base), getattr(torch, adapter)
    inputs = tensors((2, 3, IN), base)
    for name in ("lora_A", "lora_B"):
        inputs[name] = inputs[name].detach().to(adapter).requires_grad_()
    got = outputs_and_gradients(ours, inputs)
    dtypes = {name: value.dtype for name, value in got.items()}
    assert dtypes == {"y": base, "x": base, "weight": base, "bias": base, "lora_A": adapter, "lora_B": adapter}
    # A and B are rounded to the base's dtype, and so are h and the output: some units in the last place
    eps = torch.finfo(base).eps
    assert_equal_all(got, outputs_and_gradients(dense, in_float64(inputs)), rtol=4 * eps, atol=20 * eps)


def test_float64_adapters_on_a_float32_input_get_float64_gradients() -> None:
    inputs = tensors(dtype=torch.float32)
    inputs |= {name: inputs[name].detach().double().requires_grad_() for name in ("lora_A", "lora_B")}
    got = outputs_and_gradients(ours, inputs)
    assert (got["y"].dtype, got["lora_A"].dtype, got["lora_B"].dtype) == (torch.float32, torch.float64, torch.float64)
    assert_equal_all(got, outputs_and_gradients(dense, in_float64(inputs)), **FLOAT32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_gives_what_it_gives_to_the_plain_formula(dtype) -> None:
    inputs = tensors((2, 3, IN), torch.float32)

    def plain(x, weight, bias, lora_A, lora_B) -> Tensor:
        return F.linear(x, weight, bias) + F.linear(F.linear(x, lora_A) * SCALING, lora_B)

    def cast(function):
        def call(*args):
            with torch.autocast("cpu", dtype=dtype):
                return function(*args)

        return call

    got, expected = outputs_and_gradients(cast(ours), inputs), outputs_and_gradients(cast(plain), inputs)
    assert {n: v.dtype for n, v in got.items()} == {n: v.dtype for n, v in expected.items()}
    eps = torch.finfo(dtype).eps  # both round in the same places but one: the sum of the two products
    assert_equal_all(got, outputs_and_gradients(dense, in_float64(inputs)), rtol=4 * eps, atol=20 * eps)


def test_autocast_leaves_float64_alone_and_disabled_autocast_is_none() -> None:
    inputs, single = tensors(), tensors(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ours(**inputs), ours(**inputs))
        y = ours(**inputs)
        with torch.autocast("cpu", enabled=False):
            inner = ours(**single)
    assert torch.equal(y, ours(**inputs))
    assert torch.equal(inner, ours(**single))


def test_mixed_input_and_weight_dtypes_are_an_error_as_in_linear() -> None:
    inputs = tensors(dtype=torch.float32)
    inputs["x"] = inputs["x"].detach().bfloat16()
    with pytest.raises(RuntimeError, match="dtype"):
        ours(**inputs)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_first_and_second_derivatives_pass_gradcheck(dropout) -> None:
    inputs = tuple(tensors((3, IN)).values())

    def function(*args) -> Tensor:
        return ours(*args, dropout=dropout, seed=torch.tensor(5))

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("frozen", ["x", "lora_A", "lora_B", "weight"])
def test_second_derivatives_pass_gradgradcheck_with_one_input_frozen(frozen) -> None:
    names = [name for name in ("x", "weight", "bias", "lora_A", "lora_B") if name != frozen]
    inputs = tensors((3, IN), grad=names)
    assert torch.autograd.gradgradcheck(
        lambda *args: ours(**{**inputs, **dict(zip(names, args, strict=True))}), tuple(inputs[name] for name in names)
    )


def test_second_backward_adds_the_same_gradients_again() -> None:
    inputs = tensors(dtype=torch.float32)
    loss = ours(**inputs, dropout=0.3, seed=torch.tensor(2)).square().sum()
    loss.backward(retain_graph=True)
    first = {name: tensor.grad.clone() for name, tensor in inputs.items()}
    loss.backward()
    assert all(torch.equal(tensor.grad, 2 * first[name]) for name, tensor in inputs.items())


def test_a_layer_used_twice_gets_the_sum_of_both_uses() -> None:
    square = {
        name: torch.randn(4, 4, dtype=torch.float64, requires_grad=True) for name in ("weight", "lora_A", "lora_B")
    }
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)

    def twice(linear):
        return linear(linear(x).tanh()).square().sum()

    leaves = [x, *square.values()]
    got = torch.autograd.grad(twice(lambda t: lora_linear(t, bias=None, **square, scaling=SCALING)), leaves)
    expected = torch.autograd.grad(
        twice(lambda t: dense(t, square["weight"], None, square["lora_A"], square["lora_B"])), leaves
    )
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)  # the order of additions differs


def test_an_output_that_does_not_reach_the_loss_gives_no_gradient() -> None:
    inputs = tensors()
    used, unused = ours(**inputs), ours(**inputs)
    torch.stack([used.sum(), unused.detach().sum()]).sum().backward()
    assert torch.equal(inputs["bias"].grad, torch.full((OUT,), 4.0, dtype=torch.float64))


def test_noncontiguous_input_and_weight_are_read_right() -> None:
    inputs = tensors(dtype=torch.float64)
    x = torch.randn(IN, 4, 3, dtype=torch.float64).permute(2, 1, 0)
    weight = inputs["weight"].detach().t().contiguous().t()
    y = ours(x, weight, None, inputs["lora_A"], inputs["lora_B"])
    torch.testing.assert_close(y, dense(x, weight, None, inputs["lora_A"], inputs["lora_B"]), rtol=1e-12, atol=1e-12)


def adapted_linear(dropout: float = 0.0) -> nn.Module:
    model = inject(nn.Sequential(nn.Linear(IN, IN)), LoRAConfig(r=R, dropout=dropout, target_modules=["0"]))
    nn.init.normal_(model[0].lora_B)
    return model


def test_functional_call_and_func_grad_equal_autograd() -> None:
    model, x = adapted_linear(), torch.randn(4, IN)
    adapter = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def loss(parameters) -> Tensor:
        return torch.func.functional_call(model, parameters, (x,)).square().sum()

    got = torch.func.grad(loss)({name: p.detach() for name, p in adapter.items()})
    model(x).square().sum().backward()
    assert got.keys() == {"0.lora_A", "0.lora_B"}
    for name, p in adapter.items():  # the scaling is multiplied in at another place
        torch.testing.assert_close(got[name], p.grad)


@pytest.mark.parametrize("is_merged", [False, True])
def test_a_layer_takes_its_input_by_the_name_that_its_base_gives_it(is_merged: bool) -> None:
    model, x = nn.Sequential(nn.Linear(6, 7)), torch.randn(3, 6)
    inject(model, LoRAConfig(r=2))
    if is_merged:
        merge(model)
    assert torch.equal(model[0](input=x), model[0](x))


def test_what_is_left_over_of_a_transform_gets_gradients() -> None:
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept["twice"] = tensor * 2
        return tensor.sum()

    x, W, B = (torch.randn(shape, dtype=torch.float64) for shape in ((3, 6), (7, 6), (7, 2)))
    A = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    torch.func.vjp(keep, A)
    lora_linear(x, W, None, kept["twice"], B, scaling=0.5).sum().backward()
    expected = torch.autograd.grad((x @ W.t() + 0.5 * x @ (2 * A).t() @ B.t()).sum(), A)[0]
    torch.testing.assert_close(A.grad, expected)


def test_other_values_given_to_functional_call_are_used() -> None:
    model, x = adapted_linear(), torch.randn(4, IN)
    zeros = {"0.lora_B": torch.zeros(IN, R)}
    y = torch.func.functional_call(model, zeros, (x,))
    assert torch.equal(y, F.linear(x, model[0].weight, model[0].bias))


# what is kept for backward


def saved_tensors(function) -> list[Tensor]:
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return kept


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_backward_keeps_x_and_the_rank_r_activation_and_nothing_else(dropout) -> None:
    inputs = tensors((2, 7, IN), torch.float32, grad=("x", "lora_A", "lora_B"))
    seed = torch.tensor(1)
    kept = saved_tensors(lambda: ours(**inputs, dropout=dropout, seed=seed))
    known = {t.untyped_storage().data_ptr() for name, t in inputs.items() if name != "x"} | {seed.data_ptr()}
    activations = {t.untyped_storage().data_ptr(): t for t in kept if t.untyped_storage().data_ptr() not in known}
    x_bytes, h_bytes = 2 * 7 * IN * 4, 2 * 7 * R * 4
    assert inputs["x"].data_ptr() in activations
    assert sum(t.untyped_storage().nbytes() for t in activations.values()) == x_bytes + h_bytes


def test_a_frozen_adapter_keeps_no_activation_at_all() -> None:
    inputs = tensors((7, IN), torch.float32, grad=("x",))
    kept = saved_tensors(lambda: ours(**inputs))
    parameters = {t.data_ptr() for name, t in inputs.items() if name != "x"}
    assert {t.data_ptr() for t in kept} <= parameters


def test_under_autocast_the_input_is_kept_once_and_in_the_short_dtype() -> None:
    inputs = tensors((7, IN), torch.float32, grad=("lora_A", "lora_B"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        kept = saved_tensors(lambda: ours(**inputs))
    parameters = {t.untyped_storage().data_ptr() for name, t in inputs.items() if name != "x"}
    activations = {t.untyped_storage().data_ptr(): t for t in kept if t.untyped_storage().data_ptr() not in parameters}
    assert sum(t.untyped_storage().nbytes() for t in activations.values()) == 7 * (IN + R) * 2


# the dropout mask

ROWS, COLUMNS = 1000, 512


def mask_of(seed: int, rows: int = ROWS, columns: int = COLUMNS, dropout: float = 0.3) -> Tensor:
    return keep_mask(torch.tensor(seed), torch.empty(rows, columns), dropout) == 0


@pytest.mark.parametrize("dropout", [0.01, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("seed", [0, 1, 2**31 - 2])
def test_mask_drops_the_asked_share(seed, dropout) -> None:
    share = mask_of(seed, dropout=dropout).double().mean().item()
    # five standard deviations of the mean of independent draws
    assert abs(share - dropout) < 5 * (dropout * (1 - dropout) / (ROWS * COLUMNS)) ** 0.5


@pytest.mark.parametrize("dim", [0, 1])
def test_shares_of_single_rows_and_columns_spread_as_independent_draws_do(dim) -> None:
    mask = mask_of(7).double()
    shares = mask.mean(dim)
    variance = 0.3 * 0.7 / mask.shape[dim]
    # the variance estimated from n shares has a relative standard deviation of sqrt(2 / n); five of them
    assert abs(shares.var().item() / variance - 1) < 5 * (2 / len(shares)) ** 0.5


@pytest.mark.parametrize(("dy", "dx"), [(0, 1), (1, 0), (1, 1), (0, 2), (2, 0), (0, 64), (64, 0), (8, 8), (256, 256)])
def test_neighbouring_entries_are_uncorrelated(dy, dx) -> None:
    centred = mask_of(3).double() - 0.3
    a, b = centred[: ROWS - dy, : COLUMNS - dx], centred[dy:, dx:]
    correlation = (a * b).mean().item() / 0.21
    assert abs(correlation) < 5 / a.numel() ** 0.5  # five standard deviations


def test_pairs_of_rows_share_no_pattern_across_columns() -> None:
    centred = (mask_of(5, 200, 2048).double() - 0.3) / 0.21**0.5
    correlations = (centred @ centred.T / 2048).fill_diagonal_(0)
    # the largest of 200 * 199 / 2 normal values of deviation 1 / sqrt(2048) stays under six of these
    assert correlations.abs().max().item() < 6 / 2048**0.5


@pytest.mark.parametrize("other", [1, 2, 3, 2**16, 2**31 - 2])
def test_other_seeds_give_independent_masks(other) -> None:
    a, b = mask_of(0).double() - 0.3, mask_of(other).double() - 0.3
    assert abs((a * b).mean().item()) / 0.21 < 5 / a.numel() ** 0.5  # five standard deviations


def test_rows_of_one_mask_are_not_columns_or_rows_of_the_next_seed() -> None:
    a, b = mask_of(0, 256, 256), mask_of(1, 256, 256)
    for first, second in ((a, b), (a, b.T), (a, a.T)):
        same = (first[:, None, :] == second[None, :, :]).all(-1)
        assert not same.any()


def test_mask_is_the_same_on_every_call_and_touches_no_random_state() -> None:
    state = torch.get_rng_state()
    first, second = mask_of(4), mask_of(4)
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)


def test_each_call_of_a_layer_drops_other_entries_and_a_seeded_run_repeats() -> None:
    model, x = adapted_linear(dropout=0.5), torch.randn(4, IN)
    torch.manual_seed(9)
    first, second = model(x), model(x)
    torch.manual_seed(9)
    assert torch.equal(model(x), first)
    assert not torch.equal(first, second)


def test_the_share_that_remains_is_scaled_so_that_the_mean_stays() -> None:
    inputs = {**tensors((1, IN)), "weight": None, "bias": None}
    expected = ours(**inputs)
    x = inputs["x"].expand(20_000, IN)
    y = ours(**{**inputs, "x": x}, dropout=0.25, seed=torch.tensor(0))
    deviations = ((y.mean(0) - expected[0]) / (y.std(0) / 20_000**0.5)).abs()
    assert deviations.max().item() < 5  # of the mean of independent draws


# recomputation and compilation


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(IN, 16), nn.Linear(16, IN)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())


class Recomputed(TwoLayers):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=False)


def two_layers(cls=TwoLayers, dropout: float = 0.4) -> nn.Module:
    torch.manual_seed(0)
    model = inject(cls(), LoRAConfig(r=R, dropout=dropout, target_modules=["first", "second"]))
    for layer in (model.first, model.second):
        nn.init.normal_(layer.lora_B)
    return model.double()


def gradients(model: nn.Module, forward, x: Tensor) -> dict[str, Tensor]:
    torch.manual_seed(1)
    y = forward(x)
    y.square().sum().backward()
    return {"y": y.detach(), "x": x.grad, **{n: p.grad for n, p in model.named_parameters() if p.requires_grad}}


def leaf() -> Tensor:
    return torch.randn(8, IN, generator=torch.Generator().manual_seed(2), dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_gives_the_same_bits_with_dropout(reentrant) -> None:
    plain, recomputed = two_layers(), two_layers()
    expected = gradients(plain, plain, leaf())
    got = gradients(recomputed, lambda x: checkpoint(recomputed, x, use_reentrant=reentrant), leaf())
    assert all(torch.equal(got[name], expected[name]) for name in expected)


@COMPILES
@pytest.mark.parametrize("cls", [TwoLayers, Recomputed])
def test_compiled_in_one_graph_equals_eager(cls) -> None:
    eager, model = two_layers(TwoLayers, 0.0), two_layers(cls, 0.0)
    expected = gradients(eager, eager, leaf())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    got = gradients(model, compiled, leaf())
    assert_equal_all(got, expected, rtol=1e-10, atol=1e-10)  # float64; aot may reorder sums


def dense_with_recovered_masks(model: nn.Module, x: Tensor, seeds: list[int], dropout: float) -> Tensor:
    def layer(one, x: Tensor, seed: int) -> Tensor:
        kept = keep_mask(torch.tensor(seed), x, dropout)
        return (
            F.linear(x, one.weight, one.bias)
            + one.lora_scaling * (x * kept / (1 - dropout)) @ one.lora_A.T @ one.lora_B.T
        )

    return layer(model.second, layer(model.first, x, seeds[0]).tanh(), seeds[1])


@COMPILES
@pytest.mark.parametrize("cls", [TwoLayers, Recomputed])
def test_compiled_in_one_graph_with_dropout_is_one_function_in_forward_and_backward(cls) -> None:
    model, x = two_layers(cls), leaf()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    got = gradients(model, compiled, x)
    torch.manual_seed(1)
    seeds = [int(torch.randint(2**31 - 1, ())) for _ in range(2)]
    twin = two_layers(TwoLayers)
    expected = gradients(twin, lambda x: dense_with_recovered_masks(twin, x, seeds, 0.4), leaf())
    assert_equal_all(got, expected, rtol=1e-10, atol=1e-10)  # float64; the order of additions differs


@COMPILES
def test_compiled_dropout_draws_anew_on_every_call() -> None:
    model, x = two_layers(), leaf()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert not torch.equal(compiled(x), compiled(x))


# merged weights


@settings(max_examples=40, deadline=None)
@given(
    out_features=st.integers(1, 12),
    in_features=st.integers(1, 12),
    r=st.integers(1, 6),
    scaling=st.floats(0.01, 16),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 1000),
)
def test_merged_weight_is_the_float64_sum_rounded_once(out_features, in_features, r, scaling, dtype, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out_features, in_features, generator=generator).to(dtype)
    lora_A = torch.randn(r, in_features, generator=generator)
    lora_B = torch.randn(out_features, r, generator=generator)
    merged = merged_weight(weight, lora_A, lora_B, scaling)
    exact = weight.double() + scaling * (lora_B.double() @ lora_A.double())
    assert merged.dtype == dtype
    # the product is in float32 (its terms may cancel), then one rounding to the weight's dtype
    terms = weight.double().abs() + scaling * (lora_B.double().abs() @ lora_A.double().abs())
    bound = terms * (r + 3) * torch.finfo(torch.float32).eps + exact.abs() * torch.finfo(dtype).eps / 2
    assert ((merged.double() - exact).abs() <= bound).all()


def test_merged_weight_leaves_its_inputs_alone() -> None:
    weight, lora_A, lora_B = torch.randn(5, 4), torch.randn(2, 4), torch.randn(5, 2)
    kept = copy.deepcopy((weight, lora_A, lora_B))
    merged_weight(weight, lora_A, lora_B, 2.0)
    assert all(torch.equal(a, b) for a, b in zip(kept, (weight, lora_A, lora_B), strict=True))


def test_dropout_of_slices_of_features_is_the_slice_of_the_whole_mask() -> None:
    seed = torch.tensor(5)
    x, A, B = torch.randn(7, 12), torch.eye(12), torch.eye(12)
    whole = lora_linear(x, None, None, A, B, scaling=1.0, dropout=0.4, seed=seed)
    settings = {"scaling": 1.0, "dropout": 0.4, "seed": seed}
    parts = [
        lora_linear(x[:, first : first + 4], None, None, torch.eye(4), torch.eye(4), columns=(first, 12), **settings)
        for first in (0, 4, 8)
    ]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=0)
    assert 0 < (whole == 0).sum() < whole.numel()
