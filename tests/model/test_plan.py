"""plan(model, config): it says what an injection will do, changes nothing, and is what the injection then does."""

import copy
import dataclasses
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from lightning_lora import LayerPlan, LoRAConfig, Plan, apply, inject, named_adapter_parameters, plan, remove
from lightning_lora.layers import LoRALayer
from lightning_lora.model.state import named_lora_layers, named_pairs, named_trained_whole
from lightning_lora.model.summary import summary
from tests import models, zoo

CONFIGS: dict[str, dict[str, Any]] = {
    "default": {"r": 4},
    "patterns": {"r": 4, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 1.0}, "use_rslora": True},
    "biases": {"r": 2, "bias": "lora_only", "dropout": 0.1},
    "dora": {"r": 2, "use_dora": True},
    "lora_bias": {"r": 2, "lora_bias": True},
    "rows": {"r": 2, "trainable_token_indices": [1, 2, 3]},
    "head": {"r": 2, "modules_to_save": ["lm_head"]},
    "capped": {"r": 24},
    "pissa": {"r": 2, "init": "pissa"},
}


def whole_state(model: nn.Module) -> list[Any]:
    """Return all that a plan could have changed, tensors by their identity and their values."""
    state: list[Any] = [torch.get_rng_state().tolist()]
    for name, module in model.named_modules():
        state.append((name, type(module), module.training, {key: id(value) for key, value in vars(module).items()}))
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        state.append((name, id(tensor), tensor.requires_grad, tensor.dtype, tensor.detach().float().sum().item()))
    return state


def check_is_what_inject_does(decided: Plan, model: nn.Module) -> None:
    """Compare a plan with the model after an injection: pairs, ranks, scales, classes, sizes, what else trains."""
    layers, pairs = named_lora_layers(model), named_pairs(model)
    assert sorted(pairs) == sorted(one.name for one in decided)
    for one in decided:
        layer, pair = layers[one.layer], pairs[one.name]
        assert (pair.r, pair.scaling) == (one.r, one.scaling)
        assert isinstance(layer, one.mixin)
        assert layer.lora_dropout == one.dropout
    trains = {id(p): p.numel() for p in model.parameters() if p.requires_grad}
    assert sum(trains.values()) == decided.num_trainable
    assert sum(p.numel() for _, p in named_adapter_parameters(model)) == decided.num_adapter
    assert {name: p.numel() for name, p in named_trained_whole(model).items()} == decided.trained


@pytest.mark.parametrize("case", CONFIGS)
def test_a_plan_changes_nothing_and_is_what_inject_does(case: str) -> None:
    model, config = models.llama(), LoRAConfig(**CONFIGS[case])
    before = whole_state(model)
    decided = plan(model, config)
    assert whole_state(model) == before
    torch.manual_seed(0)
    expected = inject(models.llama(), config).state_dict()
    torch.manual_seed(0)
    assert apply(decided) is model
    check_is_what_inject_does(decided, model)
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    remove(model)
    assert whole_state(model)[-1] == before[-1]


@pytest.mark.parametrize("family", zoo.FAMILIES, ids=lambda family: family.name)
def test_the_plan_of_every_family_is_what_inject_does(family: zoo.Family) -> None:
    model = family.build()
    decided = plan(model, LoRAConfig(r=2))
    check_is_what_inject_does(decided, inject(model, LoRAConfig(r=2)))


def test_a_plan_prints_as_a_table() -> None:
    model = nn.Sequential(nn.Linear(16, 32), nn.Embedding(10, 8), nn.Linear(8, 1500))
    config = LoRAConfig(r=4, dropout=0.1, target_modules=["0", "2"], trainable_token_indices={"1": [2]}, bias="all")
    assert str(plan(model, config)).splitlines() == [
        "LoRA for Sequential: 2 pairs, 7,764 parameters train, 12,592 are frozen",
        "  name  kind    size       r  scaling  dropout  parameters",
        "  0     Linear  16 -> 32   4        2      0.1         192",
        "  2     Linear  8 -> 1500  4        2      0.1       6,032",
        "  rows of 1 that train: 2",
        "  trained whole: 0.bias, 2.bias (1,532 parameters)",
    ]


def test_a_plan_is_frozen_and_says_what_it_read() -> None:
    decided = plan(models.llama(), LoRAConfig(r=4))
    first = decided[0]
    assert isinstance(first, LayerPlan)
    assert (first.name, first.in_features, first.out_features) == ("model.layers.0.self_attn.q_proj", 32, 32)
    assert len(decided) == len(list(decided)) == 14
    with pytest.raises(dataclasses.FrozenInstanceError):
        first.r = 8  # type: ignore[misc]
    again = plan(models.llama(), LoRAConfig(r=4))
    assert decided == again
    assert hash(decided) == hash(again)
    assert decided != plan(models.llama(), LoRAConfig(r=2))


def test_a_plan_is_applied_once() -> None:
    model = models.llama()
    decided = plan(model)
    apply(decided)
    with pytest.raises(ValueError, match="was adapted since it was planned: call remove on it, and plan anew"):
        apply(decided)
    with pytest.raises(ValueError, match="already adapted"):
        plan(model)
    remove(model)
    apply(plan(model))
    assert any(isinstance(module, LoRALayer) for module in model.modules())


@pytest.mark.parametrize("other", [None, nn.Linear(4, 4), nn.Identity()], ids=["gone", "smaller", "of another kind"])
def test_a_plan_of_a_model_that_was_changed_since_is_refused_and_changes_nothing(other: nn.Module | None) -> None:
    model = models.llama()
    decided, attention = plan(model, LoRAConfig(r=8)), model.model.layers[1].self_attn
    if other is None:
        del model.model.layers[1]
    else:
        attention.q_proj = other
    before = whole_state(model)
    with pytest.raises(ValueError, match="modules of LlamaForCausalLM were changed since it was planned: plan anew"):
        apply(decided)
    assert whole_state(model) == before


def test_an_adapted_model_is_copied_and_pickled_with_its_plan() -> None:
    model = inject(models.llama(), LoRAConfig(r=2))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.lora_injection.plan == model.lora_injection.plan
        remove(other)


def test_a_start_line_names_every_layer_whatever_it_is_called() -> None:
    model = nn.ModuleDict({"outside_proj": nn.Linear(4, 4), "head": nn.Linear(4, 4)})
    inject(model, LoRAConfig(r=2, target_modules=["outside_proj"], modules_to_save=["head"]))
    said = summary(model, "", model)
    assert "LoRA on ModuleDict: 1 layers adapted (outside_proj)" in said
    assert "\n  outside " not in said


def test_an_output_projection_that_is_left_out_is_not_drawn() -> None:
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2)})
    config = LoRAConfig(r=2, target_modules=["attention"], exclude_modules=["out_proj"], init_rng="peft")
    decided = plan(model, config)
    assert [one.name for one in decided] == ["attention"]
    check_is_what_inject_does(decided, inject(model, config))
