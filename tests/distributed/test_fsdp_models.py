"""Many models under ``fsdp_lora`` in Fabric, on 2 and 4 gloo ranks, each against itself in one process."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_lora import LoRAConfig, adapter_state_dict, inject, named_adapter_parameters
from lightning_lora.ops.sharded import whole
from tests import models, zoo
from tests.distributed.hand_written import GPT, ReadsItsTable, Scalars, VisionTransformer
from tests.distributed.ranks import on_ranks
from tests.distributed.sharded import EVERYTHING, share_in_shards, start
from tests.distributed.training import EXACT, from_all_ranks, rank_of

GRADIENT_TOLERANCE = {"rtol": 1e-4, "atol": 1e-6}  # other order of sums, over ranks and in products of fewer rows
# lr 1e-3 / eps 1e-4 turns a rounding of 1e-7 in a gradient into 1e-6 per step, and there are three
STEP_TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}
LOSS_TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}


def ids(rows: int = 4, columns: int = 6) -> Tensor:
    return models.token_ids(rows, columns, seed=5)


def lm_loss(model: nn.Module, batch: Tensor) -> Tensor:
    return model(input_ids=batch, labels=batch).loss


def squares(model: nn.Module, batch: Tensor) -> Tensor:
    y = model(batch)
    return (y if isinstance(y, Tensor) else y.logits).float().square().mean()


def body_then_head(model: Any, batch: Tensor) -> Tensor:
    """Call the parts of a model, as a loss over chunks does."""
    return model.lm_head(model.model(input_ids=batch).last_hidden_state).square().mean()


@dataclass
class Case:
    build: Callable[[], nn.Module]
    loss: Callable[[Any, Tensor], Tensor] = lm_loss
    batch: Callable[[], Tensor] = ids
    lora: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)


def seeded(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: models._seeded(build)


EXPERTS = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
CASES = {
    "llama": Case(models.llama),
    "tied llama": Case(lambda: models.llama(tied=True), options=EVERYTHING),
    "parts of llama": Case(models.llama, body_then_head, options=EVERYTHING),
    "parts of tied llama": Case(lambda: models.llama(tied=True), body_then_head, options=EVERYTHING),
    "gpt2": Case(models.gpt2, options=EVERYTHING),
    "gpt2 kept": Case(models.gpt2, options={**EVERYTHING, "reshard_after_forward": False}),
    "adapted embedding": Case(models.llama, lora={"target_modules": ["embed_tokens", "q_proj"]}, options=EVERYTHING),
    "token rows": Case(
        lambda: models.llama(tied=True), lora={"target_modules": ["q_proj"], "trainable_token_indices": [1, 5]}
    ),
    "dora": Case(models.llama, lora={"use_dora": True}),
    "dora in shards": Case(models.llama, lora={"use_dora": True}, options={"shard_adapters": True}),
    "pissa": Case(models.llama, lora={"init": "pissa"}),
    "pissa in shards": Case(models.llama, lora={"init": "pissa"}, options={"shard_adapters": True}),
    "lora_bias": Case(models.gpt2, lora={"lora_bias": True}),
    "biases": Case(models.gpt2, lora={"bias": "all"}),
    "biases in shards": Case(models.gpt2, lora={"bias": "all"}, options={"shard_adapters": True, **EVERYTHING}),
    "experts": Case(zoo.named("mixtral").build, lora=EXPERTS),
    "experts in shards": Case(zoo.named("mixtral").build, lora=EXPERTS, options={"shard_adapters": True}),
    "classifier": Case(models.bert_classifier, squares),
    "vision transformer": Case(seeded(VisionTransformer), squares, lambda: zoo.noise(4, 3, 16, 16)),
    "vision transformer, all of it": Case(
        seeded(VisionTransformer), squares, lambda: zoo.noise(4, 3, 16, 16), options=EVERYTHING
    ),
    "litgpt": Case(seeded(GPT), squares, options=EVERYTHING),
    "a table that is read": Case(seeded(ReadsItsTable), squares, options=EVERYTHING),
    "torch's encoder": Case(models.encoder, squares, options=EVERYTHING),
    "checkpointed torch's encoder": Case(models.encoder, squares, options={"activation_checkpointing": True}),
    "scalars": Case(seeded(Scalars), squares, lambda: zoo.noise(4, 5), options=EVERYTHING),
    "scalars in shards": Case(
        seeded(Scalars), squares, lambda: zoo.noise(4, 5), options={"shard_adapters": True, **EVERYTHING}
    ),
    "checkpointed gpt2": Case(models.gpt2, options={"activation_checkpointing": True}),
}
# parts of a quarter, and ranks that hold nothing of a tensor
IN_FOUR = (
    "tied llama", "dora in shards", "biases in shards", "experts in shards", "vision transformer, all of it", "scalars",
    "scalars in shards",
)  # fmt: skip


def make(case: Case) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = inject(case.build(), LoRAConfig(**{"r": 2, **case.lora})).eval()
    # B is zero at first, and A would have no gradient
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for _, parameter in named_adapter_parameters(model):
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    # all parameters: what is frozen has to be dropped
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-4)


def trained(model: Any, optimizer: Any, step: Callable[[], Tensor], num_steps: int = 3) -> dict[str, Any]:
    """Return the loss and gradients of the first step, and the adapters after all of them."""
    found: dict[str, Any] = {}
    for index in range(num_steps):
        loss = step()
        if index == 0:
            named = dict(model.named_parameters())
            found["gradients"] = {n: whole(p.grad).clone() for n, p in named.items() if p.grad is not None}
            found["loss"] = loss.detach().clone()
        optimizer.step()
        optimizer.zero_grad()
    found["adapters"] = {name: value.clone() for name, value in adapter_state_dict(model).items()}
    return found


@pytest.mark.parametrize(("num_ranks", "name"), [*((2, name) for name in CASES), *((4, name) for name in IN_FOUR)])
@on_ranks()
def test_three_steps_equal_one_process(num_ranks: int, name: str) -> None:
    case, (rank, _) = CASES[name], rank_of()
    parts = case.batch().chunk(num_ranks)
    expected = None
    if rank == 0:
        model, optimizer = make(case)

        def step_alone() -> Tensor:
            loss = sum(case.loss(model, part) for part in parts) / num_ranks
            loss.backward()
            return loss

        expected = trained(model, optimizer, step_alone)

    fabric = start(**case.options)
    wrapped, sharded_optimizer = fabric.setup(*make(case))
    called = wrapped if case.loss is not body_then_head else wrapped.module

    def step() -> Tensor:
        loss = case.loss(called, parts[rank])
        fabric.backward(loss)
        return fabric.all_reduce(loss.detach())

    ours = trained(wrapped.module, sharded_optimizer, step)
    expected = from_all_ranks(expected)[0]
    torch.testing.assert_close(ours["loss"], expected["loss"], **LOSS_TOLERANCE)
    torch.testing.assert_close(ours["gradients"], expected["gradients"], **GRADIENT_TOLERANCE)
    torch.testing.assert_close(ours["adapters"], expected["adapters"], **STEP_TOLERANCE)
    torch.testing.assert_close(ours["adapters"], from_all_ranks(ours["adapters"])[0], **EXACT)
    assert share_in_shards(wrapped.module) > 0.4


def assert_like_one_process(family: zoo.Family) -> None:

    def adapted() -> nn.Module:
        model = inject(family.build(), LoRAConfig(r=2, exclude_modules=family.refused or None))
        models.fill_adapters(model)
        return model

    def run(model: nn.Module, backward: Callable[[Tensor], None]) -> tuple[Tensor, dict[str, Tensor]]:
        output = family.output(model(**family.inputs()))
        backward(output.float().square().mean())
        gradients = {n: p.grad.clone() for n, p in named_adapter_parameters(model) if p.grad is not None}
        return output.detach(), gradients

    expected = run(adapted(), lambda loss: loss.backward()) if rank_of()[0] == 0 else None
    fabric, model = start(min_shard_numel=2000), adapted()
    fabric.setup(model)
    output, gradients = run(model, fabric.backward)
    expected_output, expected_gradients = from_all_ranks(expected)[0]
    torch.testing.assert_close(output, expected_output, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients, expected_gradients, **GRADIENT_TOLERANCE)
    assert share_in_shards(model) > 0.3


@pytest.mark.parametrize("first", range(0, len(zoo.FAMILIES), 6))
@on_ranks(2)
def test_families_give_the_outputs_and_gradients_of_one_process(first: int) -> None:
    for family in zoo.FAMILIES[first : first + 6]:
        print(family.name, flush=True)  # seen if it fails
        assert_like_one_process(family)
