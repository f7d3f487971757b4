"""Heads and biases that train are kept wide: small updates count, a gradient scaler takes them, the base's dtype is read."""

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import peft
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric import Fabric
from lightning.fabric.plugins import MixedPrecision as FabricMixedPrecision
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_lora import (
    LoRACallback,
    LoRAConfig,
    adapter_state_dict,
    disabled,
    inject,
    load_peft,
    merge,
    remove,
    save_peft,
)
from lightning_lora.model.state import named_trained_whole
from tests import models, runs

LABELS = torch.tensor([0, 2])


def classifier(dtype: torch.dtype = torch.bfloat16) -> Any:
    return models.bert_classifier().to(dtype)


def step_inputs() -> dict[str, Tensor]:
    return {"input_ids": models.token_ids(), "labels": LABELS}


class Small(nn.Module):
    """One of each kind of module that may train whole, read by its parent, tied, in a list of its own, and called."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.body = nn.Linear(8, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.norm = nn.LayerNorm(8)
        self.lstm = nn.LSTM(8, 8, batch_first=True)
        self.out = nn.Linear(8, 20, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.body(self.embed(ids))
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = x + self.conv(x.transpose(1, 2)).transpose(1, 2)
        x = x + self.lstm(self.norm(x))[0]
        return self.out(x)


KINDS: dict[str, dict[str, Any]] = {
    "embedding and its twin": {"modules_to_save": ["embed", "out"]},
    "attention": {"modules_to_save": ["attention"]},
    "convolution": {"modules_to_save": ["conv"]},
    "norm": {"modules_to_save": ["norm"]},
    "recurrent": {"modules_to_save": ["lstm"]},
    "all biases": {"bias": "all"},
    "biases of adapted layers": {"bias": "lora_only"},
    "biases beside an adapter's own": {"bias": "all", "lora_bias": True},
    "biases under DoRA": {"bias": "all", "use_dora": True},
    "biases under PiSSA": {"bias": "all", "init": "pissa"},
}


def small(dtype: torch.dtype, **settings: Any) -> nn.Module:
    torch.manual_seed(0)
    return inject(Small().to(dtype), LoRAConfig(r=2, **{"target_modules": ["body"], **settings}))


def small_ids() -> Tensor:
    return models.token_ids() % 20


def train_by_hand(steps: int) -> dict[str, Tensor]:
    """Return a head after ``steps``: its own copy in float32, which the model's is rounded from before each step."""
    model = inject(classifier(), LoRAConfig(r=2, target_modules=["query"], adapter_dtype="auto", modules_to_save=[]))
    head = model.classifier.requires_grad_(True)
    wide = {name: nn.Parameter(p.detach().float()) for name, p in head.named_parameters()}
    optimizer = torch.optim.AdamW(wide.values(), lr=2e-5)
    for _ in range(steps):
        with torch.no_grad():
            for name, parameter in head.named_parameters():
                parameter.copy_(wide[name])
                parameter.grad = None
        model(**step_inputs()).loss.backward()
        for name, parameter in head.named_parameters():
            assert parameter.grad is not None
            wide[name].grad = parameter.grad.float()
        optimizer.step()
    return {f"classifier.{name}": p.detach() for name, p in wide.items()}


def test_small_steps_of_a_head_in_half_precision_count() -> None:
    model = inject(classifier(), LoRAConfig(r=2, target_modules=["query"]))
    head = named_trained_whole(model)
    before = {name: p.detach().clone() for name, p in head.items()}
    optimizer = torch.optim.AdamW(head.values(), lr=2e-5)
    for _ in range(16):
        optimizer.zero_grad()
        model(**step_inputs()).loss.backward()
        optimizer.step()
    expected = train_by_hand(16)
    assert head.keys() == expected.keys()
    for name, parameter in head.items():
        assert parameter.dtype == torch.float32
        assert bool((parameter != before[name]).all())
        assert torch.equal(parameter, expected[name])  # gradients are rounded where the model's are, and nothing else


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_what_trains_is_wide_and_the_model_computes_as_before(kind: str, dtype: torch.dtype) -> None:
    settings = KINDS[kind]
    torch.manual_seed(0)
    plain = Small().to(dtype)
    model = small(dtype, **settings)
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    assert all(p.dtype == dtype for n, p in model.named_parameters() if not p.requires_grad and "lora_" not in n)
    output = model(small_ids())
    assert output.dtype == dtype
    # the base's own products, but for DoRA's and PiSSA's start and another order of the bias's sum in float32
    narrow = dtype != torch.float32 and not {"use_dora", "init"} & settings.keys()
    tolerance = 0.0 if narrow else 2e-2 if dtype != torch.float32 else 1e-5
    torch.testing.assert_close(output, plain(small_ids()), rtol=tolerance, atol=tolerance)
    F.cross_entropy(output.float().flatten(0, 1), small_ids().flatten()).backward()
    for name, parameter in named_trained_whole(model).items():
        assert parameter.grad is not None, name
        assert parameter.grad.dtype == torch.float32
        assert bool(parameter.grad.any()), name
    remove(model)
    assert {type(module) for module in model.modules()} == {type(module) for module in plain.modules()}
    for (name, tensor), (other, former) in zip(model.state_dict().items(), plain.state_dict().items(), strict=True):
        assert (name, tensor.dtype) == (other, former.dtype)
        assert torch.equal(tensor, former)
    assert torch.equal(model(small_ids()), plain(small_ids()))


@pytest.mark.parametrize("kind", KINDS)
def test_merging_for_good_rounds_what_trained_once(kind: str) -> None:
    model = small(torch.bfloat16, **KINDS[kind])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in named_trained_whole(model).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 1e-3)
    expected = {name: p.detach().to(torch.bfloat16) for name, p in named_trained_whole(model).items()}
    before = model(small_ids())
    merge(model, remove=True)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    state = dict(model.named_parameters())
    if "lora_bias" not in KINDS[kind]:  # whose own is added to it
        assert all(torch.equal(state[name], value) for name, value in expected.items())
    # the merged weight is rounded to bfloat16 once, the sum of base and adapter at another place
    torch.testing.assert_close(model(small_ids()), before, rtol=2e-2, atol=2e-2)


CONVERSIONS: dict[str, tuple[Callable[[nn.Module], Any], torch.dtype, torch.dtype]] = {
    "to bfloat16": (lambda model: model.to(torch.bfloat16), torch.bfloat16, torch.float32),
    "to half and back": (lambda model: model.half().float(), torch.float32, torch.float32),
    "to double": (lambda model: model.double(), torch.float64, torch.float64),
    "to double and half": (lambda model: model.double().half(), torch.float16, torch.float32),
    "to its device": (lambda model: model.to("cpu"), torch.float32, torch.float32),
    "copied": (lambda model: copy.deepcopy(model.to(torch.bfloat16)), torch.bfloat16, torch.float32),
    "pickled": (
        lambda model: pickle.loads(pickle.dumps(model.to(torch.bfloat16))),
        torch.bfloat16,
        torch.float32,
    ),
}


@pytest.mark.parametrize("case", CONVERSIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_conversions_move_what_is_read_and_never_narrow_what_trains(kind: str, case: str) -> None:
    convert, read, kept = CONVERSIONS[case]
    model = small(torch.float32, **KINDS[kind])
    values = {name: p.detach().clone() for name, p in named_trained_whole(model).items()}
    same = convert(model)
    model = model if same is None else same
    for name, parameter in named_trained_whole(model).items():
        assert parameter.dtype == kept
        assert torch.equal(parameter.to(values[name].dtype), values[name])
    output = model(small_ids())
    assert output.dtype == read
    output.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.dtype == kept for p in named_trained_whole(model).values())


def test_a_frozen_batch_norm_whose_bias_trains_is_pickled() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).to(torch.bfloat16)
    inject(net, LoRAConfig(r=2, target_modules=["0"], bias="all"))
    again = pickle.loads(pickle.dumps(net))
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(again(x), net(x))
    assert [type(module) for module in again.modules()] == [type(module) for module in net.modules()]


def test_a_state_that_is_assigned_is_widened() -> None:
    model = inject(classifier(), LoRAConfig(r=2, target_modules=["query"]))
    model.load_state_dict(classifier().state_dict(), assign=True)
    assert {p.dtype for p in named_trained_whole(model).values()} == {torch.float32}
    assert torch.equal(model.classifier.weight, classifier().classifier.weight)
    assert model(**step_inputs()).loss.dtype == torch.bfloat16


def test_disabled_reads_the_first_values() -> None:
    model = inject(classifier(), LoRAConfig(r=2, target_modules=["query"]))
    models.fill_adapters(model)
    with torch.no_grad():
        for parameter in named_trained_whole(model).values():
            parameter.add_(1e-3)
    with disabled(model):
        assert torch.equal(model(models.token_ids()).logits, classifier()(models.token_ids()).logits)


def test_a_model_on_meta_is_filled_and_stays_wide() -> None:
    with torch.device("meta"):
        model = Small().to(torch.bfloat16)
    inject(model, LoRAConfig(r=2, target_modules=["body"], modules_to_save=["norm", "conv"]))
    torch.manual_seed(0)
    state = Small().to(torch.bfloat16).state_dict()
    model.to_empty(device="cpu")
    model.load_state_dict(state)
    assert {p.dtype for p in named_trained_whole(model).values()} == {torch.float32}
    torch.manual_seed(0)
    assert torch.equal(model(small_ids()), Small().to(torch.bfloat16)(small_ids()))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own tracing builds one
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning")
def test_heads_and_biases_compile_in_one_graph() -> None:
    model = inject(classifier().eval(), LoRAConfig(r=2, bias="all"))
    trained = list(named_trained_whole(model).values())
    expected = torch.autograd.grad(model(**step_inputs()).loss, trained)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    gradients = torch.autograd.grad(compiled(**step_inputs()).loss, trained)
    assert all(gradient.dtype == torch.float32 for gradient in gradients)
    # a traced graph adds in another order, in bfloat16
    torch.testing.assert_close(gradients, expected, rtol=2e-2, atol=2e-3)


def test_with_dtype_auto_everything_keeps_its_own() -> None:
    model = inject(classifier(torch.float16), LoRAConfig(r=2, target_modules=["query"], adapter_dtype="auto"))
    assert {p.dtype for p in model.parameters()} == {torch.float16}


def test_peft_reads_a_wide_head_and_rounds_it(tmp_path: Path) -> None:
    model = inject(classifier(), LoRAConfig(r=2, target_modules=["query"])).eval()
    models.fill_adapters(model)
    with torch.no_grad():
        for parameter in named_trained_whole(model).values():
            parameter.add_(1e-4)
    save_peft(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(classifier(), tmp_path).eval()
    # the adapter's term is added before or after a rounding to bfloat16
    close = {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(theirs(models.token_ids()).logits, model(models.token_ids()).logits, **close)
    ours = load_peft(classifier(), tmp_path).eval()
    for name, parameter in named_trained_whole(ours).items():
        assert torch.equal(parameter, named_trained_whole(model)[name])


# runs


class Module(pl.LightningModule):
    def __init__(self, dtype: torch.dtype, lr: float = 2e-5) -> None:
        super().__init__()
        self.model, self.lr = classifier(dtype).train(), lr

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.model(batch, labels=batch[:, 0] % 3).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=self.lr)


def data() -> "DataLoader[Tensor]":
    return DataLoader(models.token_ids(64, 7, seed=1), batch_size=4)


def scaling() -> dict[str, Any]:
    # Lightning makes 16-mixed into bf16-mixed on CPU, unless it is given the plugin
    return {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=4.0))]}


@pytest.mark.parametrize(
    ("dtype", "settings"),
    [
        (torch.float32, {"precision": "bf16-true"}),
        (torch.bfloat16, {"precision": "bf16-true"}),
        (torch.bfloat16, {}),
        (torch.float16, scaling()),
        (torch.float32, {"precision": "bf16-mixed"}),
    ],
    ids=["converted", "bf16-true", "loaded in bf16", "float16 and a scaler", "mixed"],
)
def test_every_entry_of_a_head_moves_at_a_small_rate(dtype: torch.dtype, settings: Any, tmp_path: Path) -> None:
    module = Module(dtype)
    before = {n: p.detach().float().clone() for n, p in module.model.classifier.named_parameters()}
    file = ModelCheckpoint(tmp_path, save_last=True, save_top_k=0)
    run = runs.trainer(tmp_path, LoRACallback(r=2, target_modules=["query"]), file, **settings)
    run.fit(module, data())
    assert run.global_step == 16
    for name, parameter in module.model.classifier.named_parameters():
        assert parameter.dtype == torch.float32
        assert bool((parameter != before[name]).all())
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(saved["model.classifier.weight"], dict(module.model.classifier.named_parameters())["weight"])


def test_a_resumed_run_is_exact(tmp_path: Path) -> None:
    def run(directory: Path, epochs: int, path: Path | None = None) -> dict[str, Tensor]:
        torch.manual_seed(0)  # of dropout
        module = Module(torch.bfloat16, lr=1e-2)
        file = ModelCheckpoint(directory, save_last=True, save_top_k=0)
        trainer = runs.trainer(directory, LoRACallback(r=2, bias="all"), file, max_epochs=epochs)
        trainer.fit(module, data(), ckpt_path=path)
        return adapter_state_dict(module)

    whole = run(tmp_path / "whole", 2)
    run(tmp_path / "half", 1)
    resumed = run(tmp_path / "rest", 2, tmp_path / "half" / "last.ckpt")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


AUTO = "tensors that train are in float16, which GradScaler cannot unscale.*adapter_dtype='float32'"


def test_a_scaler_and_float16_that_trains_are_refused_before_the_first_step(tmp_path: Path) -> None:
    callback = LoRACallback(r=2, target_modules=["query"], adapter_dtype="auto")
    with pytest.raises(ValueError, match=AUTO):
        runs.trainer(tmp_path, callback, **scaling()).fit(Module(torch.float16), data())


def fabric() -> Fabric:
    plugin = FabricMixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=4.0))
    return Fabric(accelerator="cpu", devices=1, plugins=[plugin])


def test_fabric_refuses_them_too() -> None:
    model = inject(classifier(torch.float16), LoRAConfig(r=2, target_modules=["query"], adapter_dtype="auto"))
    with pytest.raises(ValueError, match=AUTO):
        fabric().setup(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0))


def test_fabric_steps_with_a_scaler() -> None:
    model = inject(classifier(torch.float16), LoRAConfig(r=2, target_modules=["query"]))
    head = named_trained_whole(model)
    before = {name: p.detach().clone() for name, p in head.items()}
    ours = fabric()
    wrapped, optimizer = ours.setup(
        model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-5)
    )
    ours.backward(wrapped(**step_inputs()).loss)
    optimizer.step()
    assert all(p.dtype == torch.float32 and bool((p != before[name]).all()) for name, p in head.items())


def test_a_checkpoint_of_the_whole_module_is_read_by_torch() -> None:
    model = inject(classifier(), LoRAConfig(r=2, target_modules=["query"]))
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=False)
    assert torch.equal(again(models.token_ids()).logits, model(models.token_ids()).logits)
