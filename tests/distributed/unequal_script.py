"""One rank of runs in which ranks have unequal numbers of batches to evaluate."""

import os
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_lora import LoRACallback, MegatronLoRAStrategy, adapter_state_dict
from tests import models, runs
from tests.distributed.launch import report
from tests.runs import LanguageModule

NUM_BATCHES = ((3, 1), (1, 4))  # of each of two dataloaders on rank 0 and rank 1


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


def metrics(run: pl.Trainer) -> dict[str, float]:
    return {name: value.item() for name, value in run.callback_metrics.items()}


def main(directory: Path, strategy: str) -> None:
    rank = int(os.environ["RANK"])
    training = DataLoader(models.token_ids(8, 8, seed=rank), batch_size=2)
    found: dict[str, Any] = {}
    for name, settings in (("without", {"limit_val_batches": 0}), ("with", {"val_check_interval": 2})):
        module = Evaluated()
        run = trainer(directory, strategy, **settings)
        run.fit(module, training, loaders(rank))
        found[name] = {key: value.clone() for key, value in adapter_state_dict(module).items()}
        found[f"{name}_norm"] = module.norm.running_mean.clone()
    module = Evaluated()
    run = trainer(directory, strategy)
    run.test(module, loaders(rank), verbose=False)
    found["losses"], found["metrics"] = module.evaluated, metrics(run)
    outputs = trainer(directory, strategy).predict(module, loaders(rank))
    found["predicted"] = [torch.cat(one) for one in outputs]
    report(directory, found)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
