"""Adapters over weights that are no plain tensors: bitsandbytes', torchao's, a user's own, and ours."""

import copy
import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from lightning_lora import (
    LoRAConfig,
    adapter_state_dict,
    disabled,
    inject,
    load_peft,
    merge,
    named_adapter_parameters,
    plan,
    remove,
    save_peft,
    unmerge,
)
from lightning_lora.layers import register_stored_weight
from lightning_lora.model.state import named_lora_layers
from tests import models, stored
from tests.fuse.test_counters import Kernels

IDS = models.token_ids(2, 12)
CLOSE = {"rtol": 1e-5, "atol": 1e-6}  # float32: sums in another order
FORMS = pytest.mark.parametrize("kind", stored.ALL)
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torchao", "ignore::DeprecationWarning")


@pytest.fixture(autouse=True)
def eager():
    """Importing bitsandbytes and torchao compiles kernels for odd shapes."""
    with torch.compiler.set_stance("force_eager"):
        yield


def gradients(model: nn.Module, ids: Tensor = IDS) -> tuple[Tensor, dict[str, Tensor]]:
    """Return logits, and the gradients of what trains for a loss of them."""
    model.zero_grad()
    y = model(ids).logits
    y.float().square().mean().backward()
    return y.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(one: tuple[Tensor, dict[str, Tensor]], other: tuple[Tensor, dict[str, Tensor]], **close: float) -> None:
    close = close or CLOSE
    torch.testing.assert_close(one[0], other[0], **close)
    assert one[1].keys() == other[1].keys()
    for name, grad in one[1].items():
        torch.testing.assert_close(grad, other[1][name], **close, msg=name)


@FORMS
def test_outputs_and_gradients_are_those_of_dense_math_in_float64(kind: str) -> None:
    model = stored.adapted(stored.stored_llama(kind))
    reference, layers = stored.dense_llama(model, kind).double(), named_lora_layers(model)
    leaves = {n: p.detach().double().requires_grad_() for n, p in named_adapter_parameters(model)}
    weights = {
        f"{name}.weight": reference.get_parameter(f"{name}.weight")
        + layer.lora_scaling * leaves[f"{name}.lora_B"] @ leaves[f"{name}.lora_A"]
        for name, layer in layers.items()
    }
    y = torch.func.functional_call(reference, weights, (IDS,)).logits
    expected = torch.autograd.grad(y.square().mean(), list(leaves.values()))
    got = gradients(model)
    torch.testing.assert_close(got[0].double(), y, rtol=1e-4, atol=1e-5)
    for (name, grad), wanted in zip(got[1].items(), expected, strict=True):
        torch.testing.assert_close(grad.double(), wanted, rtol=1e-3, atol=1e-6, msg=name)


@FORMS
def test_at_the_start_the_model_is_its_base(kind: str) -> None:
    model = stored.stored_llama(kind).train()
    with torch.no_grad():
        expected = model(IDS).logits
        y = inject(model, LoRAConfig(r=4)).train()(IDS).logits
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)


@FORMS
def test_as_much_is_kept_for_backward_as_over_floats_and_no_dense_weight(kind: str) -> None:
    model = stored.adapted(stored.stored_llama(kind), dropout=0.1)
    dense = stored.adapted(stored.dense_llama(model, kind), dropout=0.1)
    shapes = {
        tuple(layer.lora_B.shape[:1]) + tuple(layer.lora_A.shape[1:]) for layer in named_lora_layers(model).values()
    }
    kept = {}
    for name, one in {"stored": model, "dense": dense}.items():
        saved: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):
            y = one(IDS).logits
        activations = [t for t in saved if not isinstance(t, nn.Parameter)]
        kept[name] = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in activations}.values())
        if name == "stored":
            assert not any(tuple(t.shape) in shapes for t in activations)
        del y
    assert kept["stored"] == kept["dense"]


@FORMS
def test_as_many_products_run_as_over_floats(kind: str) -> None:
    class Products(Kernels):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.total += func._schema.name in ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::linear")
            return func(*args, **(kwargs or {}))

    model = stored.adapted(stored.stored_llama(kind))
    dense = stored.adapted(stored.dense_llama(model, kind))
    counts = {}
    for name, one in {"stored": model, "dense": dense}.items():
        with Products() as counts[name]:
            gradients(one)
    assert counts["stored"].total == counts["dense"].total


@FORMS
@pytest.mark.parametrize(
    "settings",
    [
        {"dropout": 0.2},
        {"use_rslora": True, "bias": "lora_only"},
        {"lora_bias": True, "target_modules": ["q_proj", "k_proj", "v_proj"]},
        {"use_dora": True},
        {"use_dora": True, "dropout": 0.2},
        {"modules_to_save": ["lm_head"]},
    ],
    ids=["dropout", "bias", "lora_bias", "dora", "dora and dropout", "a head"],
)
def test_every_option_computes_as_over_the_dense_weight(kind: str, settings: dict[str, Any]) -> None:
    model = stored.adapted(stored.stored_llama(kind), **settings)
    dense = stored.adapted(stored.dense_llama(model, kind), **settings)
    results = []
    for one in (model, dense):
        torch.manual_seed(1)  # of the dropout masks
        results.append(gradients(one))
    assert_same(*results, rtol=1e-4, atol=1e-6)


@FORMS
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_start_from_the_base_is_a_part_of_the_dense_weight(kind: str, init: str) -> None:
    model = stored.stored_llama(kind)
    dense = stored.dense_llama(model, kind)
    for one in (model, dense):
        inject(one, LoRAConfig(r=4, init=init)).train()
    assert_same(gradients(model), gradients(dense), rtol=1e-4, atol=1e-6)


@FORMS
def test_autocast_computes_in_its_dtype(kind: str) -> None:
    model = stored.adapted(stored.stored_llama(kind))
    dense = stored.adapted(stored.dense_llama(model, kind))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results = [gradients(one) for one in (model, dense)]
    assert results[0][0].dtype == torch.bfloat16
    assert_same(*results, rtol=2e-2, atol=2e-2)  # of a weight that is rounded once or twice


@FORMS
def test_activation_checkpointing_and_copies_compute_the_same(kind: str) -> None:
    model = stored.adapted(stored.stored_llama(kind), dropout=0.1)
    copies = {"deepcopy": copy.deepcopy(model)}
    if kind not in stored.TORCHAO:  # which gives layers a method that cannot be pickled
        copies["pickle"] = pickle.loads(pickle.dumps(model))
    torch.manual_seed(1)
    expected = gradients(model)
    for other in copies.values():
        torch.manual_seed(1)
        assert_same(gradients(other), expected)
    models.checkpoint_activations(model)
    torch.manual_seed(1)
    assert_same(gradients(model), expected)


@FORMS
def test_evaluating_and_disabling_leave_the_weight_as_it_is(kind: str) -> None:
    model = stored.adapted(stored.stored_llama(kind))
    before = gradients(model)
    model.eval()
    with torch.no_grad(), disabled(model):
        base = model(IDS).logits
    with torch.no_grad():
        assert not torch.allclose(model(IDS).logits, base, atol=1e-4)
    assert_same(gradients(model.train()), before, rtol=0, atol=0)


@FORMS
def test_removing_gives_the_layers_back(kind: str) -> None:
    model = stored.stored_llama(kind).train()
    classes, keys = [type(m) for m in model.modules()], [*model.state_dict()]
    with torch.no_grad():
        before = model(IDS).logits
        remove(stored.adapted(model))
        assert torch.equal(model(IDS).logits, before)
    assert [type(m) for m in model.modules()] == classes
    assert [*model.state_dict()] == keys


@FORMS
def test_peft_directories_are_written_and_read(kind: str, tmp_path: Path) -> None:
    model = stored.adapted(stored.stored_llama(kind))
    save_peft(model, tmp_path)
    loaded = load_peft(stored.stored_llama(kind), tmp_path).train()
    assert_same(gradients(loaded), gradients(model), rtol=0, atol=0)


@FORMS
def test_tokens_are_generated(kind: str) -> None:
    model = stored.adapted(stored.stored_llama(kind)).eval()
    options = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(IDS), "pad_token_id": 0}
    tokens = model.generate(IDS, **options)
    with torch.no_grad():
        assert torch.equal(tokens[:, -1], model(tokens[:, :-1]).logits[:, -1].argmax(-1))


def test_merging_a_layer_that_holds_no_weight_is_refused() -> None:
    model = stored.adapted(stored.stored_llama("registered"))
    before = gradients(model)
    with pytest.raises(
        ValueError, match=r"cannot merge 'model\.layers\.0\.self_attn\.q_proj': 'weight' is not a stored"
    ):
        merge(model)
    assert_same(gradients(model), before, rtol=0, atol=0)


@pytest.mark.parametrize("kind", [kind for kind in stored.ALL if kind != "registered"])
@torch.no_grad()
def test_merging_gives_the_adapted_models_outputs_and_unmerging_the_stored_weights(kind: str) -> None:
    model = stored.adapted(stored.stored_llama(kind))
    expected = model(IDS).logits
    merged_logits = merge(model)(IDS).logits
    # plain weights, another order of sums; bitsandbytes' int8 rounds what it multiplies
    torch.testing.assert_close(merged_logits, expected, rtol=1e-3, atol=0.05 if "int8" in kind else 1e-4)
    assert all(type(layer.weight) is nn.Parameter for layer in named_lora_layers(model).values())
    assert torch.equal(unmerge(model)(IDS).logits, expected)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning", "ignore:The .grad:UserWarning")
def test_a_compiled_step_is_one_graph_that_keeps_as_much_as_over_floats() -> None:
    kind = "bnb-nf4-dq"
    model = stored.adapted(stored.stored_llama(kind))
    dense = stored.adapted(stored.dense_llama(model, kind))
    expected, kept, graphs = gradients(model), {}, {}
    for name, one in {"stored": model, "dense": dense}.items():
        saved: list[Tensor] = []
        graphs[name] = CompileCounterWithBackend("aot_eager")
        torch.compiler.reset()
        with torch.compiler.set_stance("default"):
            compiled = torch.compile(one, backend=graphs[name])
            with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):
                y = compiled(IDS, use_cache=False).logits
        kept[name] = sum(t.numel() * t.element_size() for t in saved if not isinstance(t, nn.Parameter))
        one.zero_grad()
        y.square().mean().backward()
        got = y.detach(), {n: p.grad for n, p in one.named_parameters() if p.grad is not None}
        assert_same(got, expected, rtol=1e-4, atol=1e-6)
    assert graphs["stored"].frame_count == graphs["dense"].frame_count == 1
    assert kept["stored"] < kept["dense"] + 64 * 64 * 4  # less than one dense weight besides


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning", "ignore:The .grad:UserWarning")
@pytest.mark.parametrize("kind", stored.TORCHAO)
def test_compiled_layers_over_torchaos_weights_keep_none_of_them_dense(kind: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64))
    stored.in_torchao(model, kind)
    stored.adapted(model, target_modules=["0", "2"])
    x, saved = torch.randn(12, 64, requires_grad=True), list[Tensor]()
    inputs = [x, *(p for p in model.parameters() if p.requires_grad)]
    expected = torch.autograd.grad(model(x).square().sum(), inputs)
    torch.compiler.reset()
    with torch.compiler.set_stance("default"):
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            y = compiled(x)
    torch.testing.assert_close(torch.autograd.grad(y.square().sum(), inputs), expected)
    assert not {(128, 64), (64, 128)} & {tuple(t.shape) for t in saved if not isinstance(t, nn.Parameter)}


@pytest.mark.parametrize("kind", stored.BITSANDBYTES)
def test_ten_steps_of_adamw_are_pefts(kind: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    ours = stored.adapted(stored.stored_llama(kind))
    save_peft(ours, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(stored.stored_llama(kind), tmp_path, is_trainable=True).train()
    losses = {}
    for name, model in {"ours": ours, "theirs": theirs}.items():
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses[name] = []
        for step in range(10):
            optimizer.zero_grad()
            ids = models.token_ids(2, 12, seed=step)
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            losses[name].append(loss.item())
    torch.testing.assert_close(torch.tensor(losses["ours"]), torch.tensor(losses["theirs"]), rtol=1e-4, atol=1e-5)
    trained = {n.replace("base_model.model.", ""): p for n, p in theirs.named_parameters() if p.requires_grad}
    for name, value in adapter_state_dict(ours).items():
        their_name = name.replace("lora_A", "lora_A.default.weight").replace("lora_B", "lora_B.default.weight")
        # Adam divides small differences of gradients by their size
        torch.testing.assert_close(value, trained[their_name].detach(), rtol=1e-2, atol=2e-3, msg=name)


class TestBitsandbytes:
    def test_a_layer_that_computes_in_a_dtype_of_its_own_runs_its_own_forward(self) -> None:
        layers = pytest.importorskip("bitsandbytes").nn
        layer = layers.Linear4bit(64, 64, quant_type="nf4", compute_dtype=torch.bfloat16).to("cpu").train()
        x = torch.randn(3, 64)
        expected = layer(x)
        model = inject(nn.Sequential(layer), LoRAConfig(r=4, target_modules=["0"]))
        assert torch.equal(model(x), expected)

    def test_before_it_is_quantised_a_layer_is_adapted_but_gives_no_values(self) -> None:
        layers = pytest.importorskip("bitsandbytes").nn
        model = nn.Sequential(layers.Linear4bit(64, 64, quant_type="nf4"))
        with pytest.raises(ValueError, match="'0'.*is not quantised yet: move the model to its device first"):
            plan(model, LoRAConfig(r=4, target_modules=["0"], use_dora=True))
        inject(model, LoRAConfig(r=4, target_modules=["0"])).to("cpu").train()
        x = torch.randn(3, 64)
        expected = nn.functional.linear(x, stored.dense_weight(model[0], "bnb-nf4"), model[0].bias)
        torch.testing.assert_close(model(x), expected)

    def test_int8_in_eval_mode_runs_its_own_forward_which_quantises_the_input(self) -> None:
        model = stored.stored_llama("bnb-int8").eval()
        with torch.no_grad(), warnings.catch_warnings():
            expected = model(IDS).logits
            assert torch.equal(inject(model, LoRAConfig(r=4)).eval()(IDS).logits, expected)

    def test_an_embedding_in_4_bits_is_adapted(self) -> None:
        layers = pytest.importorskip("bitsandbytes").nn
        model = nn.Sequential(layers.Embedding4bit(10, 64).to("cpu"))
        base = model(IDS % 10)
        inject(model, LoRAConfig(r=4, target_modules=["0"]))
        models.fill_adapters(model)
        layer: Any = model[0]
        term = layer.lora_A.t()[IDS % 10] @ layer.lora_B.t() * layer.lora_scaling
        torch.testing.assert_close(model(IDS % 10), base + term)


class TestRefusals:
    """What cannot be read is refused by name when the injection is planned."""

    def test_torchaos_layers_that_quantise_their_input(self) -> None:
        ao = pytest.importorskip("torchao.quantization")
        model = stored.llama()
        stored.in_torchao(model, "", ao.Int8DynamicActivationInt8WeightConfig())
        with pytest.raises(ValueError, match=r"'model\.layers\.0\.self_attn\.q_proj'.*with act_quant_kwargs"):
            plan(model, LoRAConfig(r=4))

    def test_a_weight_of_torchao_that_says_no_values(self) -> None:
        base = pytest.importorskip("torchao.utils").TorchAOBaseTensor

        class Opaque(base):
            tensor_data_names, tensor_attribute_names = ["codes"], []

            @staticmethod
            def __new__(cls, codes: Tensor) -> Any:
                return Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)

            def __init__(self, codes: Tensor) -> None:
                self.codes = codes

        model = nn.Sequential(nn.Linear(64, 64))
        model[0].weight = nn.Parameter(Opaque(torch.zeros(64, 64, dtype=torch.int8)), requires_grad=False)
        with pytest.raises(ValueError, match="'0' cannot be adapted: its weight is stored as Opaque.*no dequantize"):
            plan(model, LoRAConfig(r=4, target_modules=["0"]))

    def test_a_weight_that_a_module_around_its_layer_reads(self) -> None:
        ao = pytest.importorskip("torchao.quantization")
        model = nn.Sequential(nn.MultiheadAttention(64, 4))
        ao.quantize_(model, ao.Int8WeightOnlyConfig(), filter_fn=lambda m, n: n == "0.out_proj")
        with pytest.raises(ValueError, match=r"'0\.out_proj' cannot be adapted: a module around it reads its weight"):
            plan(model, LoRAConfig(r=4, target_modules=["0"]))

    def test_a_registration_of_something_else(self) -> None:
        with pytest.raises(TypeError, match="a class of layers or of weights, or its full name, got 3"):
            register_stored_weight(3, lambda layer: None)  # type: ignore[arg-type]


def test_packages_are_not_imported_for_a_plain_base() -> None:
    code = (
        "import sys, torch; from lightning_lora import LoRAConfig, inject; "
        "inject(torch.nn.Sequential(torch.nn.Linear(8, 8)), LoRAConfig(r=2, target_modules=['0'])); "
        "assert not {'bitsandbytes', 'torchao'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
