"""One rank that logs sums and metrics under ``megatron_lora``, where ranks that share a model see the same batches."""

import copy
import os
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import Tensor
from torchmetrics import MeanMetric, MetricCollection, SumMetric
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

from lightning_lora import LoRAConfig, MegatronLoRAStrategy, inject
from lightning_lora.fabric import MegatronLoRAStrategy as FabricStrategy
from tests import models
from tests.distributed.ddp_script import rank_loader
from tests.distributed.fsdp_script import fit
from tests.distributed.launch import report
from tests.runs import LanguageModule

FABRIC_ROWS = 4


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


def counted(directory: Path, module: Counting, strategy: Any, loader: Any) -> dict[str, Any]:
    loaders = {"train_dataloaders": loader, "val_dataloaders": loader}
    trainer = fit(directory, module, strategy, loaders=loaders, num_sanity_val_steps=0)
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    # all rows of a batch, in an order of the ranks
    seen = [sorted(batch.reshape(-1, batch.shape[-1]).tolist()) for batch in module.gathered]
    rank, decide = trainer.global_rank, trainer.strategy.reduce_boolean_decision
    votes = [
        decide(rank == 0, all=False),
        decide(rank == 0, all=True),
        decide(True, all=True),
        decide(False, all=False),
    ]
    return {"logged": logged, "confusion": module.confusion, "copied": module.copied, "seen": seen, "votes": votes}


def in_fabric(num_ranks: int) -> dict[str, Any]:
    early = Fabric(accelerator="cpu", devices=num_ranks, strategy=FabricStrategy())
    early.launch()
    ranks = early.all_reduce(torch.ones(()), reduce_op="sum")  # no model says yet which of them share one
    fabric = Fabric(accelerator="cpu", devices=num_ranks, strategy=FabricStrategy(tensor_parallel_size=2))
    fabric.launch()
    fabric.setup(inject(models.llama(layers=1), LoRAConfig(r=2)))
    ids = models.token_ids(FABRIC_ROWS, 3)
    mine = ids.chunk(num_ranks // 2)[fabric.global_rank // 2]
    group = fabric.strategy.data_parallel_group
    metric = SumMetric(process_group=group)
    metric.update(mine.float())
    return {
        "ranks": float(ranks),
        "sum": float(fabric.all_reduce(mine.sum().float(), reduce_op="sum")),
        "mean": float(fabric.all_reduce(mine.float().mean())),
        "gathered": fabric.all_gather(mine).reshape(-1, 3),
        "metric": float(metric.compute()),
    }


def main(directory: Path) -> None:
    num_ranks, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    strategy, replicas = MegatronLoRAStrategy(tensor_parallel_size=2), num_ranks // 2
    found = counted(directory, Counting(), strategy, rank_loader(rank // 2, replicas))
    found["fabric"] = in_fabric(num_ranks)
    report(directory, found)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
