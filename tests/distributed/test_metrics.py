"""Sums, metrics and gathers under ``megatron_lora`` on gloo ranks against one process: each batch counts once."""

import copy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric import Fabric
from torch import Tensor
from torchmetrics import MeanMetric, MetricCollection, SumMetric
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

from lightning_lora import LoRAConfig, MegatronLoRAStrategy, inject
from lightning_lora.fabric import MegatronLoRAStrategy as FabricStrategy
from tests import models
from tests.distributed.ranks import on_ranks
from tests.distributed.training import fit, rank_loader, rank_of
from tests.runs import LanguageModule


class Counting(LanguageModule):
    """Logs one thing in every way that Lightning has: by name with a reduction, and as metrics of torchmetrics."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.value = SumMetric(), MeanMetric()
        self.judged = MetricCollection([MulticlassAccuracy(4), MulticlassConfusionMatrix(4)])
        self.gathered: list[Tensor] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        for fx in ("sum", "mean", "max", "min"):
            self.log(f"train_{fx}", batch.float().mean(), reduce_fx=fx, sync_dist=True, on_step=False, on_epoch=True)
        self.rows(torch.tensor(float(len(batch))))
        self.log("train_rows", self.rows, on_step=False, on_epoch=True)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("tokens", float(batch.numel()), reduce_fx="sum", sync_dist=True)
        self.value.update(batch.float().mean(), len(batch))
        self.judged.update(batch[:, 0] % 4, batch[:, 1] % 4)
        self.gathered.append(self.all_gather(batch))

    def on_validation_epoch_end(self) -> None:
        self.log("value", self.value)
        judged = self.judged.compute()
        self.confusion = judged["MulticlassConfusionMatrix"]
        self.log("accuracy", judged["MulticlassAccuracy"])
        self.copied = copy.deepcopy(self.judged).compute()["MulticlassConfusionMatrix"]

    def rows_seen(self) -> list[Any]:
        """Return all rows of every batch, in an order that does not depend on ranks."""
        return [sorted(batch.reshape(-1, batch.shape[-1]).tolist()) for batch in self.gathered]


def counted(directory: Path, strategy: Any, rank: int, num_ranks: int) -> tuple[pl.Trainer, Counting]:
    module, loader = Counting(), rank_loader(rank, num_ranks)
    loaders = {"train_dataloaders": loader, "val_dataloaders": loader}
    return fit(directory, module, strategy, loaders=loaders, num_sanity_val_steps=0), module


@pytest.fixture(scope="module")
def single(directory: Path) -> dict[str, Any]:
    """Return what one process logs, counts and sees of all rows."""
    trainer, module = counted(directory, "auto", 0, 1)
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return {"logged": logged, "confusion": module.confusion, "rows": module.rows_seen()}


@on_ranks(2, 4)
def test_what_is_logged_counted_and_gathered_equals_one_process(
    tmp_path: Path, single: dict[str, Any], num_ranks: int
) -> None:
    rank, replicas = rank_of()[0], num_ranks // 2
    trainer, module = counted(tmp_path, MegatronLoRAStrategy(tensor_parallel_size=2), rank // 2, replicas)
    logged = trainer.callback_metrics
    for name in ("tokens", "value", "accuracy", "train_rows", "train_mean"):
        assert float(logged[name]) == pytest.approx(single["logged"][name], rel=1e-5)

    means = torch.tensor([[batch.float().mean() for batch in rank_loader(i, replicas)] for i in range(replicas)])
    assert float(logged["train_sum"]) == pytest.approx(float(means.sum()), rel=1e-5)
    assert float(logged["train_max"]) == pytest.approx(float(means.max()))
    assert float(logged["train_min"]) == pytest.approx(float(means.min()))

    assert torch.equal(module.confusion, single["confusion"])
    assert torch.equal(module.copied, single["confusion"])
    assert module.rows_seen() == single["rows"]

    decide = trainer.strategy.reduce_boolean_decision
    assert decide(rank == 0, all=False)
    assert not decide(rank == 0, all=True)
    assert decide(True, all=True)
    assert not decide(False, all=False)


@on_ranks(2, 4)
def test_fabric_counts_every_row_once(num_ranks: int) -> None:
    fabric = Fabric(accelerator="cpu", devices=num_ranks, strategy=FabricStrategy(tensor_parallel_size=2))
    fabric.launch()
    fabric.setup(inject(models.llama(layers=1), LoRAConfig(r=2)))
    ids = models.token_ids(4, 3)
    mine = ids.chunk(num_ranks // 2)[fabric.global_rank // 2]
    metric = SumMetric(process_group=fabric.strategy.data_parallel_group)
    metric.update(mine.float())
    assert float(fabric.all_reduce(mine.sum().float(), reduce_op="sum")) == float(ids.sum())
    assert float(metric.compute()) == float(ids.sum())
    assert float(fabric.all_reduce(mine.float().mean())) == pytest.approx(float(ids.float().mean()))
    assert torch.equal(fabric.all_gather(mine).reshape(-1, 3), ids)


@on_ranks(2, 4)
def test_a_sum_before_fabric_has_a_model_is_over_all_ranks(num_ranks: int) -> None:
    fabric = Fabric(accelerator="cpu", devices=num_ranks, strategy=FabricStrategy())
    fabric.launch()  # no model says yet which ranks share one
    assert float(fabric.all_reduce(torch.ones(()), reduce_op="sum")) == num_ranks
