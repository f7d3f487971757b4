"""``fsdp_lora`` in the Trainer on 2 and 4 gloo ranks against one process: steps, what moves between ranks, validation."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.model_summary import ModelSummary
from torch import Tensor

from lightning_lora import FSDPLoRAStrategy, disabled
from lightning_lora.ops.sharded import is_sharded
from tests.distributed.counting import counted_collectives
from tests.distributed.ranks import on_ranks
from tests.distributed.training import (
    EXACT,
    GRADIENT_TOLERANCE,
    PROMPTS,
    SHARDED,
    STEP_TOLERANCE,
    Recorded,
    alone,
    fit,
    rank_loader,
    rank_of,
    state,
)

NUM_ADAPTERS = 4096  # elements, of 28 tensors: r=4 on the 14 linear layers of the tiny Llama
TOGETHER = {"_LoRALinearsBackward": 6, "_GatedMLPBackward": 2, "_RMSNormBackward": 4}
BLOCK = 9280  # elements


class Watched(Recorded):
    """Notes what moves between ranks in each step, and generates texts of unequal lengths while it validates."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[Tensor] = []
        self.traffic: list[dict[str, list[int]]] = []

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        assert not torch.is_inference_mode_enabled()
        self.texts.append(self.model.generate(prompt(self.global_rank), **of_length(self.global_rank)))
        with disabled(self.model):
            reference = self.model(input_ids=batch, labels=batch).loss
        self.log("reference", reference, sync_dist=True)
        self.log("val_loss", self.model(input_ids=batch, labels=batch).loss, sync_dist=True)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self._counting = counted_collectives()
        self.traffic.append(self._counting.__enter__())

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._counting.__exit__(None, None, None)


def prompt(rank: int) -> Tensor:
    return PROMPTS[rank : rank + 1, : 3 + rank % 2]


def of_length(rank: int) -> dict[str, Any]:
    return {"max_new_tokens": 2 + rank, "do_sample": False}


@pytest.fixture(scope="module")
def single() -> Recorded:
    """Two epochs on one process."""
    return alone(max_epochs=2)


@pytest.fixture(scope="module", params=[2, 4])
def num_ranks(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture(scope="module")
@on_ranks()
def straight(directory: Path, num_ranks: int) -> dict[str, Any]:
    """Train two epochs with validation before and between; return what there is to see of it on a rank."""
    module, path = Watched(), directory / f"{num_ranks} ranks"
    loaders = {"val_dataloaders": rank_loader(*rank_of())}
    trainer = fit(path, module, FSDPLoRAStrategy(**SHARDED), loaders=loaders, max_epochs=2)
    with counted_collectives() as saving:
        trainer.save_checkpoint(path / "again.ckpt")
    evaluating = (trainer.fit_loop.epoch_loop.val_loop, trainer.validate_loop, trainer.test_loop, trainer.predict_loop)
    summary = ModelSummary(module)
    return {
        "gradients": module.gradients,
        "functions": module.functions,
        "adapters": state(module),
        "losses": module.losses,
        "texts": module.texts,
        "traffic": [dict(step) for step in module.traffic],
        "saving": dict(saving),
        "logged": {name: value.item() for name, value in trainer.callback_metrics.items()},
        "sharded": [name for name, p in module.named_parameters() if is_sharded(p)],
        "inference modes": [loop.inference_mode for loop in evaluating],
        "parameters": (summary.total_parameters, summary.trainable_parameters),
    }


def test_gradients_losses_and_eight_steps_equal_one_process(straight: list[Any], single: Recorded) -> None:
    torch.testing.assert_close(straight[0]["gradients"], single.gradients, **GRADIENT_TOLERANCE)
    torch.testing.assert_close(straight[0]["adapters"], state(single), **STEP_TOLERANCE)
    mean_losses = torch.tensor([rank["losses"] for rank in straight]).mean(0)
    torch.testing.assert_close(mean_losses, torch.tensor(single.losses), **STEP_TOLERANCE)


def test_layers_are_computed_together_as_in_one_process(straight: list[Any], single: Recorded) -> None:
    # two blocks: q, k, v together, and o; the MLP; two norms; then the last norm. Behind a frozen embedding there is
    # no gradient to gather: q, k and v of the first block stay apart, and its first norm as it is
    assert single.functions == TOGETHER
    assert all(rank["functions"] == TOGETHER for rank in straight)


def test_replicas_are_bit_equal(straight: list[Any]) -> None:
    for rank in straight[1:]:
        torch.testing.assert_close(rank["adapters"], straight[0]["adapters"], **EXACT)


def test_the_base_is_in_shards_and_the_adapters_are_not(straight: list[Any]) -> None:
    names = straight[0]["sharded"]
    assert len(names) == 20  # 9 per block, embedding, head; the final norm is too small
    assert not any(".lora_" in name for name in names)


def test_a_step_gathers_the_base_and_reduces_the_adapters_once(straight: list[Any], num_ranks: int) -> None:
    table, block = -(-100 // num_ranks) * 32, BLOCK // num_ranks
    # forward: embedding, two blocks, head; backward: the first block again
    gathers = [table, block, block, table, block]
    expected = {"all_gather": gathers, "reduce_scatter": [], "all_reduce": [NUM_ADAPTERS + 28], "broadcast": []}
    for rank in straight:
        # validation leaves the last block and the head gathered: the first step of an epoch saves those two
        steps = rank["traffic"]
        assert steps[1:4] + steps[5:8] == [expected] * 6
        assert steps[0]["all_gather"] == [table, block, block]


def test_a_save_gathers_nothing(straight: list[Any]) -> None:
    assert not any(size for rank in straight for size in rank["saving"].values())


def test_validation_sees_the_adapters_and_the_base_alone(straight: list[Any], single: Recorded) -> None:
    with torch.no_grad(), disabled(single):
        losses = [single.model(input_ids=batch, labels=batch).loss for batch in rank_loader(0, 1)]
    for rank in straight:
        expected = torch.stack(losses).mean()
        torch.testing.assert_close(torch.tensor(rank["logged"]["reference"]), expected, rtol=1e-5, atol=1e-6)
        assert rank["logged"]["val_loss"] < rank["logged"]["reference"]


def test_texts_of_unequal_lengths_are_those_of_one_process(straight: list[Any], single: Recorded) -> None:
    for index, rank in enumerate(straight):
        assert torch.equal(rank["texts"][-1], single.model.generate(prompt(index), **of_length(index)))


def test_no_loop_runs_in_inference_mode(straight: list[Any]) -> None:
    # Lightning leaves it out under gloo by itself, and under NCCL it does not
    assert straight[0]["inference modes"] == [False] * 4


def test_counts_are_global(straight: list[Any], single: Recorded) -> None:
    total = sum(parameter.numel() for parameter in single.parameters())
    assert straight[1]["parameters"] == (total, NUM_ADAPTERS)


ACCUMULATED = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.05}


@pytest.fixture(scope="module")
def single_accumulated() -> dict[str, Tensor]:
    return state(alone(**ACCUMULATED))


@on_ranks(2)
def test_accumulation_reduces_once_per_step(single_accumulated: dict[str, Tensor]) -> None:
    module = Watched()
    fit(None, module, **ACCUMULATED)
    assert [step["all_reduce"] for step in module.traffic] == [[], [NUM_ADAPTERS + 28]] * 2
    torch.testing.assert_close(state(module), single_accumulated, **STEP_TOLERANCE)
