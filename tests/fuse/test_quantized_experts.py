"""Experts with packed matrices, against experts with the dense values of the same packed matrices."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from lightning_lora import (
    LoRAConfig,
    adapter_checkpoint,
    disabled,
    inject,
    load_adapter_state_dict,
    load_peft,
    merge,
    merge_receipt,
    plan,
    quantize,
    remove,
    save_peft,
    unmerge,
)
from lightning_lora.fuse.experts import QuantizedExperts
from lightning_lora.layers.quantized import QuantizedModule, dequantize_parameters
from lightning_lora.model.quantize import plan_quantization
from lightning_lora.ops.experts.function import lora_experts
from lightning_lora.ops.experts.records import ExpertWeights
from lightning_lora.ops.packed import FORMS
from lightning_lora.ops.packed_stack import PackedStack
from tests import models
from tests.fuse import test_experts as experts_tests
from tests.fuse.test_counters import saved_bytes
from tests.fuse.test_experts import (
    EXPERTS,
    GATES,
    IMPLEMENTATIONS,
    PARAMETERS,
    RANK,
    TOKENS,
    build,
    dense,
    mixture,
    noise,
    routing,
)
from tests.live_bytes import watched

KINDS = ["nf4", "nf4-dq", "int8"]
SAME = {"rtol": 1e-6, "atol": 1e-6}
CONFIGS = {
    "adapted": {"target_modules": ["o_proj"], "target_parameters": PARAMETERS},
    "one matrix adapted": {"target_modules": ["o_proj"], "target_parameters": PARAMETERS[1:]},
    "not adapted": {"target_modules": ["o_proj"]},
}


def config(name: str = "adapted") -> LoRAConfig:
    return LoRAConfig(r=RANK, alpha=6, **CONFIGS[name])  # type: ignore[arg-type]


def packed(name: str, kind: Any, implementation: str = "grouped_mm", how: str = "adapted") -> nn.Module:
    model = inject(build(name, implementation), config(how), quantize=kind)
    models.fill_adapters(model)
    return model.train()


def same_values(name: str, kind: Any, implementation: str = "grouped_mm") -> nn.Module:
    """Return the base whose weights are the dense values of packed ones."""
    model = build(name, implementation)
    quantize(model, kind)
    for module in list(model.modules()):
        if isinstance(module, QuantizedModule):
            dequantize_parameters(module)
    return model


def over_same_values(name: str, kind: Any, implementation: str = "grouped_mm", how: str = "adapted") -> nn.Module:
    model = inject(same_values(name, kind, implementation), config(how))
    models.fill_adapters(model)
    return model.train()


def experts_of(model: nn.Module) -> Any:
    return next(module for name, module in model.named_modules() if name.endswith("experts"))


def inputs_of(model: nn.Module, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    index, weights = routing(experts=4)
    x = noise(TOKENS, model.config.hidden_size)  # type: ignore[union-attr,arg-type]
    return x.to(dtype).requires_grad_(), index, weights.to(dtype).requires_grad_()


def results(experts: Any, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    x, index, weights = inputs
    factors = [parameter for name, parameter in experts.named_parameters() if "lora_" in name]
    y = experts(x, index, weights)
    return [y, *torch.autograd.grad(y.float().square().sum(), [x, weights, *factors])]


def dense_stack(experts: Any, name: str) -> Tensor:
    """Return all matrices, each dense by itself."""
    return torch.stack([matrix.dense(torch.float32) for matrix in getattr(experts, name).unbind()])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("gate", GATES)
def test_outputs_and_gradients_are_those_of_dense_float64_math(gate: str, transposed: bool, kind: str) -> None:
    ours, plain, opened = GATES[gate]
    index, weights = routing()
    x, weights = noise(TOKENS, 32).requires_grad_(), weights.requires_grad_()
    layers, twins = [], []
    for first, out, seed in ((32, opened * 4, 10), (opened * 4 // (opened // 12), 32, 20)):
        shape = (EXPERTS, first, out) if transposed else (EXPERTS, out, first)
        stored = FORMS[kind].quantize(noise(*shape, seed=seed))
        A, B = noise(EXPERTS, RANK, first, seed=seed + 1), noise(EXPERTS, out, RANK, seed=seed + 2)
        pair = (A.requires_grad_(), B.requires_grad_(), 1.5)
        values = stored.dense(torch.float64)
        layers.append(ExpertWeights(PackedStack(stored, transposed=transposed), None, *pair))
        twins.append(ExpertWeights(values.mT if transposed else values, None, *pair))
    inputs = [x, weights, *(factor for layer in layers for factor in layer[2:4])]
    y = lora_experts(x, index, weights, *layers, ours, dtype=x.dtype)
    expected = dense(x, index, weights, *twins, plain)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    found, wanted = (torch.autograd.grad(one.square().mean(), inputs) for one in (y, expected))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", CONFIGS)
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_models_compute_what_they_do_over_the_dense_values(name: str, how: str, kind: str) -> None:
    found = []
    for model in (packed(name, kind, how=how), over_same_values(name, kind, how=how)):
        output = model(input_ids=models.token_ids()).logits
        output.square().mean().backward()
        found.append((output, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)  # products in other orders, layer after layer


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("how", CONFIGS)
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_experts_give_the_outputs_and_gradients_of_dense_values(name: str, how: str, implementation: str) -> None:
    model, twin = (build_one(name, "nf4-dq", implementation, how) for build_one in (packed, over_same_values))
    inputs = inputs_of(model)
    assert isinstance(experts_of(model), QuantizedExperts)
    for one, other in zip(results(experts_of(model), inputs), results(experts_of(twin), inputs), strict=True):
        torch.testing.assert_close(one / other.abs().max(), other / other.abs().max(), **SAME)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
@pytest.mark.parametrize("how", CONFIGS)
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_the_bases_own_code_reads_one_matrix_at_a_time(name: str, how: str, implementation: str) -> None:
    experts = experts_of(packed(name, "nf4-dq", implementation, how))
    inputs = inputs_of(packed(name, "nf4-dq"))
    expected = results(experts, inputs)
    hook = experts.register_module("watched", nn.Identity()) or experts.watched.register_forward_hook(lambda *_: None)
    with watched() as watching:
        found = results(experts, inputs)
    hook.remove()
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert watching.largest < experts.gate_up_proj.shape.numel()


def test_code_that_needs_all_matrices_at_once_is_refused() -> None:
    model = packed("qwen3_moe", "nf4", "batched_mm")
    experts, inputs = experts_of(model), inputs_of(model)
    experts.act_fn.register_forward_hook(lambda *_: None)
    with pytest.raises(TypeError, match=r"dense at once.*set_experts_implementation\('grouped_mm'\)"):
        experts(*inputs)
    with pytest.raises(TypeError, match="sum would make"):
        torch.sum(experts.down_proj)
    model.set_experts_implementation("grouped_mm")
    experts(*inputs).sum().backward()


def test_a_stack_looks_like_the_parameter_that_it_stands_for() -> None:
    experts, base = experts_of(packed("qwen3_moe", "nf4")), experts_of(build("qwen3_moe"))
    for name in ("gate_up_proj", "down_proj"):
        one, other = getattr(experts, name), getattr(base, name)
        assert (one.shape, one.dtype, one.device, one.ndim, len(one)) == (
            other.shape,
            other.dtype,
            other.device,
            other.ndim,
            len(other),
        )
        assert one.mT.shape == one.transpose(-1, -2).shape == other.mT.shape
        with pytest.raises(IndexError):
            one[4]


# what a step holds


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_adapted", [True, False])
def test_nothing_dense_is_kept_for_backward(is_adapted: bool, kind: Any) -> None:
    base, x = mixture()
    parameters = PARAMETERS if is_adapted else ["gate.weight"]
    block = inject(base, LoRAConfig(r=RANK, target_modules=[], target_parameters=parameters), quantize=kind)
    tokens, hidden = x[0].detach().requires_grad_(), 128
    index = torch.rand(64, 8).topk(4, dim=1)[1]
    weights = torch.rand(64, 4, requires_grad=True)
    rows, ranks = 64 * 4, 2 * RANK * is_adapted
    kept = saved_bytes(lambda: block.experts(tokens, index, weights), block.parameters())
    # tokens, what opens the experts, numbers of rank r, routing weights, order, places and ends
    assert kept == 4 * (64 * hidden + rows * (2 * 48 + ranks + 1)) + 8 * 2 * rows + 4 * 8


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_adapted", [True, False])
def test_one_matrix_is_dense_at_a_time(is_adapted: bool, kind: Any) -> None:
    base, _ = mixture(hidden=256, intermediate=128, experts=16)
    parameters = PARAMETERS if is_adapted else ["gate.weight"]
    block = inject(base, LoRAConfig(r=RANK, target_modules=[], target_parameters=parameters), quantize=kind)
    x, weights = torch.randn(16, 256, requires_grad=True), torch.rand(16, 4, requires_grad=True)
    index = torch.arange(64).view(16, 4) % 16
    with watched() as watching:
        block.experts(x, index, weights).sum().backward()
    matrix = 256 * 256
    assert watching.largest <= matrix
    # a matrix takes 4 bytes a value, and while it is made dense 2 more for its codes as indices
    held = 64 * (2 * 256 + 2 * 256 + 128) * 4
    factors = sum(p.nbytes for n, p in block.experts.named_parameters() if "lora" in n)
    assert watching.peak <= 8 * matrix + held + 2 * factors


# how it runs


@pytest.mark.parametrize("how", ["adapted", "not adapted"])
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_in_one_graph_it_gives_the_same(kind: Any, how: str) -> None:
    model = packed("gpt_oss" if kind == "int8" else "qwen3_moe", kind, how=how)
    experts, inputs = experts_of(model), inputs_of(model)
    expected = results(experts, inputs)
    torch._dynamo.reset()
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
    x, index, weights = inputs
    factors = [parameter for name, parameter in experts.named_parameters() if "lora_" in name]
    y = compiled(x, index, weights)
    found = [y, *torch.autograd.grad(y.square().sum(), [x, weights, *factors])]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_autocast_runs_the_products_of_the_loop_in_its_dtype() -> None:
    found = []
    for model in (packed("qwen3_moe", "nf4", "eager"), over_same_values("qwen3_moe", "nf4", "eager")):
        with torch.autocast("cpu", torch.bfloat16):
            found.append(results(experts_of(model), inputs_of(model)))
    for one, other in zip(*found, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one / other.abs().max(), other / other.abs().max(), rtol=0, atol=1e-2)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_products_run_in_the_dtype_of_x_as_over_a_base_that_is_cast_to_it(implementation: str) -> None:
    """FSDP2's mixed precision casts x and what it gathers, other than bytes."""
    model, twin = (one("qwen3_moe", "nf4", implementation) for one in (packed, over_same_values))
    inputs = inputs_of(model, torch.bfloat16)
    found = results(experts_of(model), inputs)
    assert found[0].dtype == torch.bfloat16
    for one, other in zip(found, results(experts_of(twin.bfloat16()), inputs), strict=True):
        torch.testing.assert_close(one / other.abs().max(), other / other.abs().max(), rtol=0, atol=2e-2)


def test_second_derivatives_are_those_over_dense_values() -> None:
    found = []
    for model in (packed("qwen3_moe", "nf4"), over_same_values("qwen3_moe", "nf4")):
        x, index, weights = inputs_of(model)
        y = experts_of(model)(x, index, weights).square().sum()
        (first,) = torch.autograd.grad(y, x, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), [x, weights]))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one / other.abs().max(), other / other.abs().max(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_gives_the_same(reentrant: bool) -> None:
    model = packed("qwen3_moe", "nf4-dq")
    x, index, weights = inputs_of(model)
    experts = experts_of(model)
    factors = [experts.lora_A_gate_up_proj, experts.lora_B_down_proj]
    gradients = []
    for call in (experts, lambda *args: checkpoint(experts, *args, use_reentrant=reentrant)):
        for tensor in (x, weights, *factors):
            tensor.grad = None
        call(x, index, weights).square().sum().backward()
        gradients.append([tensor.grad for tensor in (x, weights, *factors)])
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_compute_the_same(again: Any) -> None:
    model = packed("qwen3_moe", "nf4-dq")
    inputs = inputs_of(model)
    other = again(model)
    assert type(experts_of(other)) is type(experts_of(model))
    for one, two in zip(results(experts_of(model), inputs), results(experts_of(other), inputs), strict=True):
        assert torch.equal(one, two)


# plans, files, merging


def test_a_plan_counts_the_stacks_and_their_bytes() -> None:
    model = build("qwen3_moe")
    decided = plan(model, config(), quantize="nf4-dq").quantization
    assert decided is not None
    layers = [name for name, _ in model.named_modules() if name.endswith("mlp.experts")]
    assert decided.stacks == tuple(f"{n}.{p}" for n in layers for p in ("gate_up_proj", "down_proj"))
    assert f"and {len(decided.stacks)} stacks of experts' matrices" in str(decided)
    weights = [model.get_parameter(name) for name in (*(f"{n}.weight" for n in decided.layers), *decided.stacks)]
    assert decided.bytes_before == sum(weight.nbytes for weight in weights)
    inject(model, config(), quantize="nf4-dq")
    holders = [module for module in model.modules() if isinstance(module, QuantizedModule)]
    assert decided.bytes_after == sum(getattr(m, name).nbytes for m in holders for name in m.part_names())


@pytest.mark.parametrize(("kind", "expected"), [("nf4", 16_817_061_888), ("nf4-dq", 15_422_940_288)])
def test_bytes_of_qwen3_30b_a3b(kind: Any, expected: int) -> None:
    sizes = {"hidden_size": 2048, "moe_intermediate_size": 768, "num_experts": 128, "vocab_size": 151_936}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_hidden_layers": 48}
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **heads)).bfloat16()
    decided = plan_quantization(model, kind)
    attention = 2048 * 128 * (2 * 32 + 2 * 4)
    values = 48 * (attention + 128 * 3 * 2048 * 768)
    assert decided.bytes_before == 2 * values
    # each block of 64: 32 bytes of codes and 4 of its scale, or one, and 4 for 256 of these; an offset for each weight
    scales = 4 * values // 64 if kind == "nf4" else values // 64 + 4 * values // (64 * 256) + 4 * 48 * 6
    assert decided.bytes_after == values // 2 + scales == expected


def test_what_is_left_whole_has_a_reason() -> None:
    base, _ = mixture(hidden=8, intermediate=6)
    with pytest.raises(ValueError, match="no multiples of a block"):
        plan_quantization(base, "nf4")
    assert plan_quantization(base, "int8").stacks == ("experts.gate_up_proj", "experts.down_proj")
    model = build("qwen3_moe")
    assert "excluded" in set(plan_quantization(model, "nf4", exclude=["experts"]).left_out.values())
    holder = nn.ModuleDict({"experts": experts_tests.Experts(None), "linear": nn.Linear(8, 8)})
    decided = plan_quantization(holder, "nf4")
    assert decided.stacks == ()
    assert "own code multiplies" in decided.left_out["experts.gate_up_proj"]


def test_stacks_with_nan_are_refused() -> None:
    model = build("qwen3_moe")
    experts = experts_of(model)
    with torch.no_grad():
        experts.down_proj[1, 2, 3] = torch.nan
    with pytest.raises(ValueError, match=r"experts\.down_proj holds NaN"):
        quantize(model, "nf4")
    assert not any(isinstance(module, QuantizedModule) for module in model.modules())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_state_dicts_there_and_back(name: str, kind: Any) -> None:
    model, other, floats = build(name), build(name), build(name)
    with torch.no_grad():
        for one in (model, floats):
            for parameter in one.parameters():
                parameter.mul_(1.5)
    quantize(model, kind)
    quantize(other, kind)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    other.load_state_dict(state)
    assert torch.equal(dense_stack(experts_of(other), "down_proj"), dense_stack(experts_of(model), "down_proj"))
    quantize(again := build(name), kind)
    again.load_state_dict(floats.state_dict())
    for key, value in again.state_dict().items():
        assert torch.equal(value, state[key])
    key = next(key for key in state if key.endswith("down_proj.SCB" if kind == "int8" else "down_proj.absmax"))
    del state[key]
    with pytest.raises(ValueError, match="down_proj"):
        again.load_state_dict(state)


@pytest.mark.parametrize("kind", KINDS)
def test_merging_gives_the_trained_function_and_unmerging_the_bytes(kind: Any) -> None:
    model, ids = packed("qwen3_moe", kind).eval(), models.token_ids()
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        before = {key: value.clone() for key, value in model.state_dict().items()}
        merge(model)
        torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)
        experts = experts_of(model)
        assert [name for name in experts._parameters if "lora" not in name] == ["gate_up_proj", "down_proj"]
        assert any("experts" in one.name and one.update > 0 for one in merge_receipt(model))
        unmerge(model)
        assert torch.equal(model(input_ids=ids).logits, expected)
        after = model.state_dict()
        assert all(torch.equal(value, after[key]) for key, value in before.items())
        plain = merge(model, remove=True)
        torch.testing.assert_close(plain(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)
    assert type(experts_of(plain)) is type(experts_of(build("qwen3_moe")))


@pytest.mark.parametrize("how", ["adapted", "not adapted"])
def test_merging_into_the_original_gives_what_the_adapter_adds_to_it(tmp_path: Any, how: str) -> None:
    build("qwen3_moe").save_pretrained(tmp_path)
    model = packed("qwen3_moe", "nf4", how=how).eval()
    expected = inject(build("qwen3_moe"), config(how)).eval()
    models.fill_adapters(expected)
    ids = models.token_ids()
    logits = merge(model, base=tmp_path)(input_ids=ids).logits
    torch.testing.assert_close(logits, expected(input_ids=ids).logits, rtol=1e-5, atol=1e-6)


def test_merging_makes_experts_without_adapters_plain_too() -> None:
    model, ids = packed("qwen3_moe", "nf4", how="not adapted").eval(), models.token_ids()
    expected = model(input_ids=ids).logits
    merge(model)
    assert not isinstance(experts_of(model), QuantizedModule)
    torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)
    unmerge(model)
    assert torch.equal(model(input_ids=ids).logits, expected)


def test_requantised_merged_experts_are_packed_as_the_sum_is() -> None:
    model = packed("qwen3_moe", "int8").eval()
    expected = merge(copy.deepcopy(model))
    merge(model, requantize="int8")
    stored = FORMS["int8"].quantize(experts_of(expected).down_proj)
    assert torch.equal(dense_stack(experts_of(model), "down_proj"), stored.dense(torch.float32))
    ids = models.token_ids()
    torch.testing.assert_close(model(input_ids=ids).logits, expected(input_ids=ids).logits, rtol=0.1, atol=0.05)


def test_disabled_and_remove_give_the_quantised_base() -> None:
    base, ids = build("qwen3_moe"), models.token_ids()
    quantize(base, "nf4")
    expected = base(input_ids=ids).logits
    model = packed("qwen3_moe", "nf4")
    with disabled(model):
        assert torch.equal(model(input_ids=ids).logits, expected)
    assert torch.equal(remove(model)(input_ids=ids).logits, expected)
    inject(model, config())
    models.fill_adapters(model)
    assert torch.equal(model(input_ids=ids).logits, packed("qwen3_moe", "nf4")(input_ids=ids).logits)


def test_the_base_is_known_by_the_values_that_were_packed() -> None:
    model = packed("qwen3_moe", "nf4-dq")
    file = adapter_checkpoint(model)
    assert {name for name in file["state_dict"] if "experts" in name}
    over_floats = inject(build("qwen3_moe"), config())
    load_adapter_state_dict(over_floats, file)
    other = build("qwen3_moe")
    with torch.no_grad():
        experts_of(other).down_proj.mul_(2)
    inject(other, config(), quantize="nf4-dq")
    with pytest.raises(ValueError, match="down_proj"):
        load_adapter_state_dict(other, file)


def test_peft_directories_go_to_and_from_packed_experts(tmp_path: Any) -> None:
    model, ids = packed("qwen3_moe", "nf4"), models.token_ids()
    save_peft(model, tmp_path)
    base = build("qwen3_moe")
    quantize(base, "nf4")
    assert torch.equal(load_peft(base, tmp_path).eval()(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


def test_save_pretrained_of_packed_experts_is_refused(tmp_path: Any) -> None:
    model = build("qwen3_moe")
    quantize(model, "nf4")
    with pytest.raises(ValueError, match="packed matrices of experts"):
        model.save_pretrained(tmp_path)


def test_a_block_keeps_its_router_whole() -> None:
    base, x = mixture()
    assert isinstance(base, Qwen3MoeSparseMoeBlock)
    quantize(base, "nf4")
    assert isinstance(base.gate._parameters["weight"], nn.Parameter)
    assert torch.isfinite(base(x)).all()
