"""What holds for any adapter (Hypothesis), and what damaged or hostile directories end in."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_lora import LoRAConfig, inject, load_peft, merge, remove, save_peft, unmerge
from lightning_lora.layers import LoRALayer
from lightning_lora.model.state import named_pairs
from tests import models

NAMES = ("first", "second", "conv", "embed")
PATTERNS = ("first", "second", "conv", "body.second", r"body\.(first|conv)", "embed")
FEW = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleDict(
            {
                "embed": nn.Embedding(12, 8),
                "first": nn.Linear(8, 8),
                "conv": nn.Conv1d(8, 8, 3),
                "second": nn.Linear(8, 8),
            }
        )

    def forward(self, ids: Tensor) -> Tensor:
        x = self.body["first"](self.body["embed"](ids)).tanh()
        return self.body["second"](self.body["conv"](x.transpose(1, 2)).transpose(1, 2))


def small() -> nn.Module:
    return models._seeded(Small)


IDS = torch.randint(0, 12, (2, 6), generator=torch.Generator().manual_seed(0))
configs = st.builds(
    lambda names, r, alpha, rank, alphas, rslora: LoRAConfig(
        r=r, alpha=alpha, target_modules=names, rank_pattern=rank, alpha_pattern=alphas, use_rslora=rslora
    ),
    st.just(list(NAMES)),
    st.integers(1, 6),
    st.one_of(st.none(), st.integers(1, 40), st.floats(0.25, 40)),
    st.dictionaries(st.sampled_from(PATTERNS), st.integers(1, 8), max_size=3),
    st.dictionaries(st.sampled_from(PATTERNS), st.integers(1, 30), max_size=3),
    st.booleans(),
)


def adapted(config: LoRAConfig, seed: int = 0) -> nn.Module:
    model = inject(small(), config)
    models.fill_adapters(model, seed=seed)
    return model


@FEW
@given(config=configs)
def test_saving_and_loading_is_the_identity(config: LoRAConfig, tmp_path: Path) -> None:
    model = adapted(config)
    save_peft(model, tmp_path)
    again = load_peft(small(), tmp_path)
    own, theirs = named_pairs(model), named_pairs(again)
    assert own.keys() == theirs.keys()
    for name, pair in own.items():
        assert torch.equal(pair.A, theirs[name].A)
        assert torch.equal(pair.B, theirs[name].B)
        assert pair.scaling == pytest.approx(theirs[name].scaling, rel=1e-12)


@FEW
@given(config=configs)
def test_the_portable_form_computes_the_same(config: LoRAConfig, tmp_path: Path) -> None:
    model = adapted(config)
    save_peft(model, tmp_path, portable=True)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["r"] == written["lora_alpha"]
    assert not written["rank_pattern"] and not written["alpha_pattern"] and not written["use_rslora"]  # noqa: PT018
    # folding the scale rounds each entry of B once
    torch.testing.assert_close(load_peft(small(), tmp_path)(IDS), model(IDS), rtol=1e-5, atol=1e-5)


@FEW
@given(config=configs)
def test_merging_keeps_the_output_unmerging_and_removing_the_bits(config: LoRAConfig) -> None:
    model, base = adapted(config), small()
    expected = model(IDS)
    merge(model)
    torch.testing.assert_close(model(IDS), expected, rtol=1e-5, atol=1e-4 * max(1.0, expected.abs().max().item()))
    remove(unmerge(model))
    assert all(torch.equal(value, base.state_dict()[name]) for name, value in model.state_dict().items())


@FEW
@given(config=configs, seed=st.integers(0, 1000))
def test_patterns_in_the_file_mean_the_same_in_any_order(config: LoRAConfig, seed: int, tmp_path: Path) -> None:
    model = adapted(config)
    save_peft(model, tmp_path)
    path = tmp_path / "adapter_config.json"
    written = json.loads(path.read_text())
    for field in ("rank_pattern", "alpha_pattern"):
        items = list(written[field].items())
        random.Random(seed).shuffle(items)
        written[field] = dict(items)
    path.write_text(json.dumps(written))
    assert torch.equal(load_peft(small(), tmp_path)(IDS), model(IDS))


HOSTILE = (
    "..",
    "../../etc/passwd",
    "a" * 5000,
    "first.*",
    "(",
    "",
    "lora_A",
    "body.first.__class__",
    "\u202e",
    "body..first",
)


def _damage(kind: int, tensors: dict[str, Tensor], config: dict[str, Any], rng: random.Random) -> None:
    key = rng.choice(sorted(tensors))
    if kind == 0:
        del tensors[key]
    elif kind == 1:
        tensors[key] = tensors[key].to(rng.choice([torch.int8, torch.int64, torch.bool, torch.complex64]))
    elif kind == 2:
        tensors[key] = rng.choice(
            [tensors[key][..., :-1], tensors[key][:-1], tensors[key][None], tensors[key].flatten()]
        )
    elif kind == 3:
        tensors[rng.choice(["", "base_model.model."]) + rng.choice(HOSTILE) + ".lora_A.weight"] = torch.ones(2, 8)
    elif kind == 4:
        name = rng.choice(HOSTILE)
        tensors |= {f"base_model.model.{name}.lora_{x}.weight": torch.ones(8, 8) for x in "AB"}
    elif kind == 5:
        field = rng.choice(
            ["r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern", "trainable_token_indices"]
        )
        wrong = {
            "r": [-1, "8", None, [8], 1.5],
            "lora_alpha": [-1, "x", None, {}],
            "target_modules": [5, None, ["nope"]],
        }
        config[field] = rng.choice(wrong.get(field, [["a"], "a", 5, {"(": 3}, {"embed": []}]))
    elif kind == 6:
        config["peft_type"] = rng.choice(["IA3", None, 5])
    else:
        tensors[key] = torch.empty(0, *tensors[key].shape[1:])


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kind=st.integers(0, 7), seed=st.integers(0, 10_000))
def test_a_damaged_directory_is_one_clear_error_and_changes_nothing(kind: int, seed: int, tmp_path: Path) -> None:
    model = adapted(LoRAConfig(r=4, target_modules=["first", "second", "conv", "embed"]))
    save_peft(model, tmp_path)
    weights, path = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    tensors, config = safetensors.torch.load_file(weights), json.loads(path.read_text())
    _damage(kind, tensors, config, random.Random(seed))
    safetensors.torch.save_file({name: value.contiguous() for name, value in tensors.items()}, weights)
    path.write_text(json.dumps(config))
    base, before = small(), small().state_dict()
    said = None
    try:
        load_peft(base, tmp_path)
    except (ValueError, TypeError) as error:
        said = str(error)
    if said is None:
        # harmless damage, such as a pattern that hits nothing: then it is the same adapter
        assert kind == 5
        assert torch.equal(base(IDS), model(IDS)) or config["lora_alpha"] != 8
    else:
        assert len(said) > 20
        assert not any(isinstance(module, LoRALayer) for module in base.modules())
        assert all(parameter.requires_grad for parameter in base.parameters())
        assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
