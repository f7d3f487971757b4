"""DoRA and adapters with a bias against PEFT itself: start, gradients, training, files, merging, checkpoints."""

import copy
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lightning_lora import (
    LoRACallback,
    LoRAConfig,
    adapter_checkpoint,
    combine,
    convert,
    disabled,
    inject,
    load_adapter_state_dict,
    load_peft,
    merge,
    named_adapter_parameters,
    remove,
    save_peft,
    unmerge,
)
from lightning_lora.layers.adapt import AdapterMode
from tests import models, runs
from tests.layers.test_kinds import CLOSE, Attention, Convolution, family, give_values, keys, noise, run, seeded

IDS = models.token_ids()


@dataclass
class Kind:
    build: Callable[[], nn.Module]
    x: Tensor
    targets: list[str]
    option: str = "use_dora"
    obstacle: str | None = None  # to merging


KINDS = {
    "linear": Kind(models.llama, IDS, ["q_proj", "down_proj"]),
    "linear with bias": Kind(seeded(Attention), noise(2, 5, 16), ["head"]),
    "Conv1D": Kind(models.gpt2, IDS, ["c_attn", "c_proj"]),
    "embedding": Kind(models.llama, IDS, ["embed_tokens"]),
    "scaled embedding": Kind(family("gemma3"), IDS, ["embed_tokens"], obstacle="its weight is tied"),
    "conv1d": Kind(seeded(lambda: Convolution(1)), noise(2, 4, 16), ["first", "second"]),
    "conv2d": Kind(seeded(lambda: Convolution(2)), noise(2, 4, 16, 16), ["first", "second"]),
    "conv3d": Kind(seeded(lambda: Convolution(3)), noise(2, 4, 12, 12, 12), ["second"]),
    "bias of linear": Kind(seeded(Attention), noise(2, 5, 16), ["head"], "lora_bias"),
    "bias without one": Kind(models.llama, IDS, ["q_proj"], "lora_bias", obstacle="the base layer has none"),
    "bias of Conv1D": Kind(models.gpt2, IDS, ["c_attn", "c_proj"], "lora_bias"),
    "bias of conv2d": Kind(seeded(lambda: Convolution(2)), noise(2, 4, 16, 16), ["first", "second"], "lora_bias"),
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]


def ours(kind: Kind, **settings: Any) -> nn.Module:
    config = LoRAConfig(r=4, alpha=8, target_modules=kind.targets, **{kind.option: True, **settings})
    return inject(kind.build(), config).eval()


def theirs(kind: Kind) -> Any:
    transposed = kind.build is models.gpt2
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=kind.targets, fan_in_fan_out=transposed, **{kind.option: True}
    )
    with silent():
        return peft.get_peft_model(kind.build(), config).eval()


def read_by_peft(kind: Kind, directory: Path, **settings: Any) -> Any:
    with silent():
        return peft.PeftModel.from_pretrained(kind.build(), directory, **settings).eval()


def save_theirs(reference: Any, directory: Path) -> None:
    with silent():
        reference.save_pretrained(directory, save_embedding_layers=False)


def silent() -> Any:
    """Silence PEFT on layers without a bias to merge into, tied embeddings, and biases, which it takes for shards."""
    return warnings.catch_warnings(action="ignore")


def test_the_adapted_model_starts_as_its_base_and_with_pefts_values(kind: Kind) -> None:
    torch.manual_seed(11)
    reference = theirs(kind)
    torch.manual_seed(11)
    model = ours(kind, init_rng="peft")
    torch.testing.assert_close(run(model, kind.x), run(kind.build().eval(), kind.x), rtol=1e-6, atol=1e-6)
    expected = [p for n, p in sorted(reference.named_parameters()) if p.requires_grad]
    own = dict(named_adapter_parameters(model))
    assert len(own) == len(expected)
    for name, value in own.items():
        assert any(p.shape == value.shape and torch.allclose(p, value, rtol=1e-6) for p in expected), name


def test_files_of_both_are_read_by_the_other(kind: Kind, tmp_path: Path) -> None:
    model = ours(kind)
    give_values(model)
    save_peft(model, tmp_path / "ours")
    again = read_by_peft(kind, tmp_path / "ours")
    torch.testing.assert_close(run(again, kind.x), run(model, kind.x), **CLOSE)
    reference = theirs(kind)
    give_values(reference)
    save_theirs(reference, tmp_path / "theirs")
    assert keys(tmp_path / "ours") == keys(tmp_path / "theirs")
    loaded = load_peft(kind.build(), tmp_path / "theirs").eval()
    torch.testing.assert_close(run(loaded, kind.x), run(reference, kind.x), **CLOSE)


def test_three_steps_of_training_are_pefts(kind: Kind, tmp_path: Path) -> None:
    model = ours(kind)
    give_values(model)
    save_peft(model, tmp_path / "start")
    reference = read_by_peft(kind, tmp_path / "start", is_trainable=True)
    for one in (model, reference):
        optimizer = torch.optim.AdamW([p for p in one.parameters() if p.requires_grad], lr=1e-3, eps=1e-3)
        for _ in range(3):
            run(one, kind.x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    save_peft(model, tmp_path / "ours")
    save_theirs(reference, tmp_path / "theirs")
    own, expected = (
        safetensors.torch.load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs")
    )
    for name, value in own.items():
        # eps keeps steps of tiny gradients, whose last bits differ, from growing to lr
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["linear", "linear with bias", "Conv1D", "conv2d", "bias of linear"])
def test_dropout_means_pefts_formula(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    kind = KINDS[name]
    model = ours(kind, dropout=0.5)
    give_values(model)
    save_peft(model, tmp_path)
    reference = read_by_peft(kind, tmp_path, is_trainable=True)

    def halved(x: Tensor, *_: Any, **__: Any) -> Tensor:  # drops the same entries in both, whatever the order of calls
        kept = (torch.arange(x.numel()).view(x.shape) % 3 > 0).to(x.dtype)
        return x * kept * 2

    if kind.option == "lora_bias":  # plain LoRA: its mask is made inside the product
        monkeypatch.setattr(
            "lightning_lora.ops.linear_tensors.keep_mask",
            lambda seed, like, *_, num_columns=None: (
                torch.arange(like.shape[0] * (num_columns or like.shape[1])).view(like.shape[0], -1) % 3 > 0
            ).to(like.dtype),
        )
    for module in ("dora", "convolution"):
        monkeypatch.setattr(f"lightning_lora.layers.{module}.keep_entries", halved)
    monkeypatch.setattr(nn.Dropout, "forward", lambda self, x: halved(x) if self.p == 0.5 and self.training else x)
    for one in (model, reference):
        one.eval()
        for module in one.modules():
            if isinstance(module, AdapterMode) or (isinstance(module, nn.Dropout) and module.p == 0.5):
                module.training = True
            if isinstance(getattr(module, "lora_dropout", None), nn.ModuleDict):
                module.training = True
        run(one, kind.x).square().mean().backward()
    torch.testing.assert_close(run(model, kind.x), run(reference, kind.x), **CLOSE)
    own, expected = (
        sorted(float(p.grad.double().square().sum()) for p in one.parameters() if p.grad is not None)
        for one in (model, reference)
    )
    torch.testing.assert_close(torch.tensor(own), torch.tensor(expected), rtol=1e-4, atol=1e-9)


def test_outputs_and_gradients_are_those_of_the_dense_formula_in_float64() -> None:
    layer = models._seeded(lambda: nn.Linear(12, 7)).double()
    model = inject(nn.Sequential(layer), LoRAConfig(r=3, use_dora=True, target_modules=["0"], adapter_dtype="float64"))
    give_values(model)
    x = noise(5, 12).double()
    A, B, m = (p.detach().clone().requires_grad_() for _, p in named_adapter_parameters(model))
    V = layer.weight + 2 * B @ A
    y = F.linear(x, (m / V.norm(dim=1).detach())[:, None] * V, layer.bias)
    torch.testing.assert_close(model(x), y)
    y.square().sum().backward()
    model(x).square().sum().backward()
    for own, expected in zip((p for _, p in named_adapter_parameters(model)), (A, B, m), strict=True):
        torch.testing.assert_close(own.grad, expected.grad)


def test_merging_unmerging_disabling_removing_and_copying(kind: Kind) -> None:
    base, model = kind.build().eval(), ours(kind)
    give_values(model)
    before, expected = copy.deepcopy(model.state_dict()), run(model, kind.x)
    assert torch.equal(run(copy.deepcopy(model), kind.x), expected)
    frozen = copy.deepcopy(base).requires_grad_(False)  # nn.MultiheadAttention in eval takes another path for those
    with disabled(model):
        assert torch.equal(run(model, kind.x), run(frozen, kind.x))
    if kind.obstacle is None:
        merge(model)
        torch.testing.assert_close(run(model, kind.x), expected, **CLOSE)
        unmerge(model)
    else:
        with pytest.raises(ValueError, match=kind.obstacle):
            merge(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    remove(model)
    assert model.state_dict().keys() == base.state_dict().keys()
    assert torch.equal(run(model, kind.x), run(base, kind.x))


def test_a_checkpoint_loads_again_and_converts(kind: Kind, tmp_path: Path) -> None:
    model = ours(kind)
    give_values(model)
    torch.save(adapter_checkpoint(model), tmp_path / "adapter.ckpt")
    again = ours(kind)
    load_adapter_state_dict(again, torch.load(tmp_path / "adapter.ckpt", weights_only=True))
    assert torch.equal(run(again, kind.x), run(model, kind.x))
    save_peft(model, tmp_path / "saved")
    convert(tmp_path / "adapter.ckpt", tmp_path / "converted")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "saved" / name).read_bytes() == (tmp_path / "converted" / name).read_bytes()


@pytest.mark.parametrize("option", ["use_dora", "lora_bias"])
def test_a_resumed_run_ends_where_an_unbroken_one_does(option: str, tmp_path: Path) -> None:
    def fit(epochs: int, seed: int, **how: Any) -> Any:
        torch.manual_seed(seed)
        module = runs.LanguageModule()
        saving = ModelCheckpoint(tmp_path, save_last=True, save_top_k=0)
        lora = LoRACallback(r=4, dropout=0.1, **{option: True})
        runs.trainer(tmp_path, lora, saving, max_epochs=epochs).fit(module, runs.loader(), **how)
        return module

    whole = fit(2, seed=0)
    (tmp_path / "last.ckpt").unlink()
    fit(1, seed=0)
    assert runs.same_adapters(fit(2, seed=5, ckpt_path=tmp_path / "last.ckpt"), whole)


@pytest.mark.parametrize(("option", "key"), [("use_dora", "lora_magnitude_vector"), ("lora_bias", "lora_B.bias")])
@pytest.mark.parametrize("damage", ["missing", "shape", "untold"])
def test_damaged_files_are_refused_and_nothing_changes(option: str, key: str, damage: str, tmp_path: Path) -> None:
    model = inject(models.llama(), LoRAConfig(r=4, target_modules=["q_proj"], **{option: True}))
    save_peft(model, tmp_path)
    weights, config_path = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    tensors = safetensors.torch.load_file(weights)
    name = f"base_model.model.model.layers.1.self_attn.q_proj.{key}"
    if damage == "missing":
        del tensors[name]
    elif damage == "shape":
        tensors[name] = torch.ones(5)
    else:
        config_path.write_text(json.dumps({**json.loads(config_path.read_text()), option: False}))
    safetensors.torch.save_file(tensors, weights)
    untouched = models.llama()
    expected = copy.deepcopy(untouched.state_dict())
    with pytest.raises(ValueError, match="q_proj"):
        load_peft(untouched, tmp_path)
    assert untouched.state_dict().keys() == expected.keys()


@pytest.mark.parametrize(
    ("build", "settings", "message"),
    [
        (seeded(Attention), {"target_modules": ["mha"], "use_dora": True}, "has no weight-decomposed adapter"),
        (seeded(lambda: Convolution(2, groups=2)), {"target_modules": ["second"], "use_dora": True}, "groups=2"),
        (lambda: models.llama().to("meta"), {"target_modules": ["q_proj"], "use_dora": True}, "load the base first"),
        (models.llama, {"target_modules": ["embed_tokens"], "lora_bias": True}, "cannot have a bias"),
    ],
)
def test_layers_that_cannot_are_refused_with_the_reason(build: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"cannot be adapted with .*{message}"):
        inject(build(), LoRAConfig(r=2, **settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True, "lora_bias": True}, "exclude one another"),
        ({"use_dora": True, "init": "pissa"}, "init='pissa'"),
        ({"lora_bias": True, "target_parameters": ["experts.down_proj"]}, "target_parameters"),
    ],
)
def test_options_that_exclude_one_another_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoRAConfig(**settings)


def test_a_base_that_is_loaded_after_injection_is_what_the_magnitudes_start_at() -> None:
    other = models.llama()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    model = inject(models.llama(), LoRAConfig(r=4, use_dora=True)).eval()
    model.load_state_dict(other.state_dict())
    torch.testing.assert_close(run(model, IDS), run(other.eval(), IDS), **CLOSE)


def test_a_magnitude_on_a_bf16_base_keeps_steps_below_bf16s() -> None:
    model = inject(models.llama(dtype=torch.bfloat16), LoRAConfig(r=4, use_dora=True, target_modules=["q_proj"]))
    for name, parameter in named_adapter_parameters(model):
        assert parameter.dtype == torch.float32, name
    assert torch.equal(run(model, IDS), run(models.llama(dtype=torch.bfloat16), IDS))


def test_portable_files_and_sums_are_refused_by_name(tmp_path: Path) -> None:
    model = inject(models.llama(), LoRAConfig(r=4, use_dora=True))
    with pytest.raises(ValueError, match="use_dora=True.*merge"):
        save_peft(model, tmp_path / "portable", portable=True)
    save_peft(model, tmp_path / "dora")
    with pytest.raises(ValueError, match="use_dora=True.*merge"):
        combine([tmp_path / "dora"], None, tmp_path / "sum")


@pytest.mark.parametrize("option", ["use_dora", "lora_bias"])
def test_configs_map_both_ways(option: str) -> None:
    config = LoRAConfig(r=4, alpha=8, target_modules=["q_proj"], init_rng="peft", **{option: True})
    assert getattr(LoRAConfig.from_peft(peft.LoraConfig(**config.to_peft())), option) is True
