"""LoRA+'s groups of parameters beside PEFT's ``create_loraplus_optimizer``: members, rates, ten steps."""

import re
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from torch import Tensor, nn

from lightning_lora import LoRAConfig, inject, load_peft, named_adapter_parameters, parameter_groups
from tests import models, zoo
from tests.runs import ClassifierModule

RATES = {"lr": 1e-3, "lora_plus_ratio": 8.0, "embedding_lr": 3e-4, "weight_decay": 0.1}
# PEFT's key of a tensor, and ours
SPELLINGS = [
    (r"^base_model\.model\.", ""),
    (r"\.modules_to_save\.default\.", "."),
    (r"\.lora_magnitude_vector\.default(\.weight)?$", ".lora_magnitude"),
    (r"\.lora_B\.default\.bias$", ".lora_bias"),
    (r"\.lora_(?:embedding_)?([AB])\.default(\.weight)?$", r".lora_\1"),
    (r"\.token_adapter\.trainable_tokens_delta\.default$", ".lora_rows"),
    (r"\.base_layer\.", "."),
]


class Pictures(nn.Module):
    """A convolution and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.last = nn.Conv2d(3, 8, 3), nn.LayerNorm(8), nn.Linear(8, 4)

    def forward(self, ids: Tensor) -> Tensor:
        pixels = torch.nn.functional.one_hot(ids[:, :6] % 3, 3).float().transpose(1, 2)  # [batch, 3, 6]
        return self.last(self.norm(self.conv(pixels[..., None] * pixels[:, :, None]).mean((2, 3))))


def pictures() -> nn.Module:
    return models._seeded(Pictures)


CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "linear": (models.llama, {"target_modules": ["q_proj", "v_proj", "down_proj"]}),
    "embedding": (models.llama, {"target_modules": ["q_proj", "embed_tokens"]}),
    "magnitudes": (models.llama, {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True}),
    "biases of adapters": (
        models.bert_classifier,
        {"target_modules": ["query"], "modules_to_save": ["classifier"], "lora_bias": True},
    ),
    "biases of the base": (models.gpt2, {"target_modules": ["c_attn"], "bias": "all", "fan_in_fan_out": True}),
    "head": (models.bert_classifier, {"target_modules": ["query"], "modules_to_save": ["classifier"]}),
    "norms": (models.bert_classifier, {"target_modules": ["query"], "modules_to_save": ["LayerNorm", "classifier"]}),
    "RMS norms": (models.llama, {"target_modules": ["q_proj"], "modules_to_save": ["norm", "lm_head"]}),
    "rows": (models.llama, {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [3, 5]}}),
    "experts": (
        zoo.named("mixtral").build,
        {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]},
    ),
    "convolution": (pictures, {"target_modules": ["conv", "last"], "use_dora": True}),
}


def both(case: str, directory: Any) -> tuple[nn.Module, nn.Module]:
    """Return PEFT's model and ours, with equal values."""
    build, config = CASES[case]
    torch.manual_seed(7)
    theirs = peft.get_peft_model(build(), peft.LoraConfig(r=4, lora_alpha=8, **config))
    if case == "experts":  # PEFT draws one matrix for all experts: read it
        theirs.save_pretrained(directory)
        return theirs, load_peft(build(), directory)
    torch.manual_seed(7)
    return theirs, inject(build(), LoRAConfig.from_peft(peft.LoraConfig(r=4, lora_alpha=8, **config)))


def their_optimizer(model: Any) -> torch.optim.Optimizer:
    return create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=RATES["lr"], loraplus_lr_ratio=RATES["lora_plus_ratio"],
        loraplus_lr_embedding=RATES["embedding_lr"], loraplus_weight_decay=RATES["weight_decay"], eps=1e-4,
    )  # fmt: skip


def members(groups: list[dict[str, Any]], model: nn.Module, spellings: list[tuple[str, str]]) -> list[list[str]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = []
    for group in groups:
        own = [names[id(parameter)] for parameter in group["params"]]
        for pattern, replacement in spellings:
            own = [re.sub(pattern, replacement, name) for name in own]
        found.append(own)
    return found


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_groups_are_pefts_in_order_with_their_rates_and_decay(case: str, tmp_path: Any) -> None:
    theirs, ours = both(case, tmp_path)
    optimizer, groups = their_optimizer(theirs), parameter_groups(ours, **RATES)
    expected, found = members(optimizer.param_groups, theirs, SPELLINGS), members(groups, ours, [])
    if case == "experts":  # our factors are named by the parameter that they adapt
        found = [[re.sub("_gate_up_proj$", "", name) for name in group] for group in found]
    assert found == expected
    for key in ("lr", "weight_decay"):
        assert [group[key] for group in groups] == [group[key] for group in optimizer.param_groups]
    assert sum(map(len, found)) == len([p for p in ours.parameters() if p.requires_grad])


def test_ten_steps_equal_pefts(case: str, tmp_path: Any) -> None:
    theirs, ours = both(case, tmp_path / "start")
    optimizers = their_optimizer(theirs), torch.optim.AdamW(parameter_groups(ours, **RATES), eps=1e-4)
    batches = [models.token_ids(2, 7, seed=step) for step in range(10)]
    losses = [
        [step(model, optimizer, ids) for ids in batches]
        for model, optimizer in zip((theirs, ours), optimizers, strict=True)
    ]
    torch.testing.assert_close(torch.tensor(losses[1]), torch.tensor(losses[0]), rtol=2e-5, atol=2e-6)
    assert abs(losses[0][-1] - losses[0][0]) > 1e-4


def step(model: nn.Module, optimizer: torch.optim.Optimizer, ids: Tensor) -> float:
    output = model(ids)
    logits = output if isinstance(output, Tensor) else output.logits
    loss = nn.functional.cross_entropy(logits.flatten(0, -2), ids.flatten()[: logits.numel() // logits.shape[-1]] % 3)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def names_by_group(groups: list[dict[str, Any]], model: nn.Module) -> dict[str, list[str]]:
    return dict(zip([group["name"] for group in groups], members(groups, model, []), strict=True))


def test_what_trains_outside_the_adapted_model_follows_the_same_rule() -> None:
    module = ClassifierModule()
    inject(module.backbone, LoRAConfig(r=4, target_modules=["linear1"]))
    module.backbone.encoder.layers[0].linear2.requires_grad_(True)  # unfrozen later
    module.backbone.embed.requires_grad_(True)
    found = names_by_group(parameter_groups(module, 1e-3), module)
    layers = [f"backbone.encoder.layers.{index}" for index in range(2)]
    assert found == {
        "A": [
            "backbone.embed.weight", f"{layers[0]}.linear1.lora_A", f"{layers[0]}.linear2.weight",
            f"{layers[1]}.linear1.lora_A", "task.0.weight", "task.2.weight",
        ],
        "embedding": [],
        "B": [f"{layers[0]}.linear1.lora_B", f"{layers[1]}.linear1.lora_B", "task.1.weight"],
        "B_no_decay": [f"{layers[0]}.linear2.bias", "task.0.bias", "task.1.bias", "task.2.bias"],
    }  # fmt: skip


def test_a_tied_and_a_frozen_parameter_are_in_no_group_twice_or_at_all() -> None:
    model = inject(models.llama(tied=True), LoRAConfig(r=4, trainable_token_indices=[1, 2]))
    frozen = model.model.layers[0].self_attn.q_proj.lora_B.requires_grad_(False)
    held = [parameter for group in parameter_groups(model, 1e-3) for parameter in group["params"]]
    expected = {id(parameter) for _, parameter in named_adapter_parameters(model)} - {id(frozen)}
    assert len(held) == len(expected)
    assert {id(parameter) for parameter in held} == expected


def test_a_head_kept_in_float32_over_bfloat16_is_the_stored_parameter() -> None:
    model = inject(models.llama(dtype=torch.bfloat16), LoRAConfig(r=4, modules_to_save=["lm_head"]))
    first = parameter_groups(model, 1e-3)[0]["params"]
    assert any(parameter is model.lm_head._parameters["weight"] for parameter in first)


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({}, TypeError, "missing 1 required positional argument: 'lr'"),
        ({"lr": None}, TypeError, "lr=None must be a finite number above 0; got NoneType"),
        ({"lr": "1e-4"}, TypeError, "lr='1e-4' must be a finite number above 0; got str"),
        ({"lr": 0}, ValueError, "lr=0 must be a finite number above 0"),
        ({"lr": 1e-4, "lora_plus_ratio": 0}, ValueError, "lora_plus_ratio=0 must be a finite number above 0"),
        ({"lr": 1e-4, "lora_plus_ratio": -16}, ValueError, "lora_plus_ratio=-16 must be"),
        ({"lr": 1e-4, "lora_plus_ratio": float("nan")}, ValueError, "lora_plus_ratio=nan must be"),
        ({"lr": 1e-4, "lora_plus_ratio": True}, TypeError, "lora_plus_ratio=True must be"),
        ({"lr": 1e-4, "embedding_lr": -1e-6}, ValueError, "embedding_lr=-1e-06 must be"),
        ({"lr": 1e-4, "weight_decay": -0.1}, ValueError, "weight_decay=-0.1 must be a finite number from 0"),
    ],
)
def test_a_bad_number_is_refused_with_what_was_expected(values: Any, error: Any, message: str) -> None:
    model = inject(models.llama(), LoRAConfig(r=4))
    with pytest.raises(error, match=message):
        parameter_groups(model, **values)


def test_a_model_without_adapters_or_with_frozen_ones_is_refused() -> None:
    with pytest.raises(ValueError, match=r"LlamaForCausalLM holds no adapters to group: add LoRACallback"):
        parameter_groups(models.llama(), 1e-4)
    model = inject(models.llama(), LoRAConfig(r=4)).requires_grad_(False)
    with pytest.raises(ValueError, match=r"nothing in LlamaForCausalLM requires grad.*list LoRACallback after it"):
        parameter_groups(model, 1e-4)


SCHEDULES: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda one: torch.optim.lr_scheduler.LambdaLR(one, lambda step: min(step / 4, (12 - step) / 8)),
    "LinearLR": lambda one: torch.optim.lr_scheduler.LinearLR(one, 0.01, total_iters=4),
    "OneCycleLR": lambda one: torch.optim.lr_scheduler.OneCycleLR(
        one, [group["lr"] for group in one.param_groups], total_steps=11
    ),
    "CosineAnnealingLR": lambda one: torch.optim.lr_scheduler.CosineAnnealingLR(one, 11),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_keep_the_ratio(name: str) -> None:
    model = inject(models.llama(), LoRAConfig(r=4, target_modules=["q_proj", "embed_tokens"]))
    optimizer = torch.optim.AdamW(parameter_groups(model, 1e-3, lora_plus_ratio=8))
    schedule = SCHEDULES[name](optimizer)
    rates = []
    for _ in range(10):
        optimizer.step()
        schedule.step()
        rates.append([group["lr"] for group in optimizer.param_groups])
    assert len({rate[0] for rate in rates}) > 3  # it does change them
    for a, embedding, b, vector in rates:
        assert [embedding, b, vector] == pytest.approx([a * 1e-3, a * 8, a * 8], rel=1e-9)
