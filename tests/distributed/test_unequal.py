"""Ranks with unequal numbers of batches to evaluate, against one process that sees all of them."""

import itertools
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_lora import LoRACallback, MegatronLoRAStrategy
from tests import models, runs
from tests.distributed.ranks import on_ranks
from tests.distributed.training import EXACT, from_all_ranks, rank_of, state
from tests.runs import LanguageModule

NUM_BATCHES = ((3, 1), (1, 4))  # of each of two dataloaders on rank 0 and rank 1
strategies = pytest.mark.parametrize("strategy", ["ddp", "fsdp_lora", "megatron_lora"])


class Evaluated(LanguageModule):
    """Keeps the losses of what it evaluates, and has a running statistic of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(8, affine=False)
        self.evaluated: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.norm(batch.float() + self.global_rank)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> None:
        loss = self.model(input_ids=batch, labels=batch).loss
        self.evaluated.append(loss.item())
        self.log("val_loss", loss, sync_dist=True, batch_size=len(batch))

    test_step = validation_step

    def predict_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        return super().predict_step(batch, batch_idx)


def rows(rank: int, dataloader: int) -> Tensor:
    """Return what a rank evaluates of a dataloader, in batches of two rows."""
    return models.token_ids(2 * NUM_BATCHES[dataloader][rank], 8, seed=10 + 2 * dataloader + rank)


def loaders(rank: int) -> list[Any]:
    return [DataLoader(rows(rank, dataloader), batch_size=2) for dataloader in range(2)]


@pytest.fixture(scope="module")
def single() -> dict[tuple[int, int], tuple[list[float], Tensor]]:
    """Return losses and logits of one process, by rank and dataloader: an adapter that has not trained changes nothing."""
    model, found = models.llama().train(False), {}
    for rank, dataloader in itertools.product(range(2), range(2)):
        ids = rows(rank, dataloader)
        with torch.no_grad():
            losses = [model(input_ids=batch, labels=batch).loss.item() for batch in ids.split(2)]
            found[rank, dataloader] = (losses, model(input_ids=ids).logits)
    return found


def trainer(directory: Path, strategy: Any, **settings: Any) -> pl.Trainer:
    return runs.trainer(
        directory,
        LoRACallback(r=4),
        devices=2,
        strategy=MegatronLoRAStrategy(tensor_parallel_size=1) if strategy == "megatron_lora" else strategy,
        use_distributed_sampler=False,
        max_epochs=2,
        **settings,
    )


@strategies
@on_ranks(2)
def test_every_batch_is_evaluated_and_predicted_and_metrics_are_means_over_all(
    tmp_path: Path, single: dict[tuple[int, int], Any], strategy: str
) -> None:
    module, rank, run = Evaluated(), rank_of()[0], trainer(tmp_path, strategy)
    run.test(module, loaders(rank), verbose=False)
    assert module.evaluated == pytest.approx(single[rank, 0][0] + single[rank, 1][0], rel=1e-5)
    for dataloader in range(2):
        everyones = single[0, dataloader][0] + single[1, dataloader][0]
        assert len(everyones) == sum(NUM_BATCHES[dataloader])
        metric = run.callback_metrics[f"val_loss/dataloader_idx_{dataloader}"].item()
        assert metric == pytest.approx(sum(everyones) / len(everyones), rel=1e-5)

    outputs = trainer(tmp_path, strategy).predict(module, loaders(rank))
    for dataloader, predicted in enumerate(outputs):
        torch.testing.assert_close(torch.cat(predicted), single[rank, dataloader][1], rtol=1e-4, atol=1e-5)


@strategies
@on_ranks(2)
def test_training_goes_on_as_without_validation(tmp_path: Path, strategy: str) -> None:
    def trained(**settings: Any) -> Evaluated:
        module, rank = Evaluated(), rank_of()[0]
        training = DataLoader(models.token_ids(8, 8, seed=rank), batch_size=2)
        trainer(tmp_path, strategy, **settings).fit(module, training, loaders(rank))
        return module

    without, validated = trained(limit_val_batches=0), trained(val_check_interval=2)
    torch.testing.assert_close(state(validated), state(without), **EXACT)
    statistic_of_rank_0 = from_all_ranks(without.norm.running_mean)[0]
    torch.testing.assert_close(validated.norm.running_mean, statistic_of_rank_0, **EXACT)
