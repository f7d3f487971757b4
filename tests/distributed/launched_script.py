"""A training script as users write it: started by plain python, torchrun, SLURM or workers; it may lose a rank on the way."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.environments import LightningEnvironment
from torch import Tensor
from torch.utils.data import DistributedSampler
from torchdata.stateful_dataloader import StatefulDataLoader

from lightning_lora import FSDPLoRAStrategy, LoRACallback, adapter_state_dict
from tests import models
from tests.runs import LanguageModule

KILLED_AT = 5  # of the 8 steps of the first epoch; where ranks share a model, of its 16
EPOCHS = {"fsdp_lora": 2, "megatron_lora": 1}


class Reporting(LanguageModule):
    """Writes every loss to a file of its rank, and dies once if it is told to."""

    def __init__(self, directory: str, dies: bool) -> None:
        super().__init__()
        self.directory, self.dies = directory, dies

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        mark = Path(self.directory, "killed")
        if self.dies and self.global_rank == 1 and self.global_step == KILLED_AT and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        loss = super().training_step(batch, batch_idx)
        with Path(self.directory, f"losses{self.global_rank}.txt").open("a") as file:
            file.write(f"{self.global_step} {loss.item()!r}\n")
        return loss


class Rows(pl.LightningDataModule):
    """Rows of the rank's own, in an order that a checkpoint keeps."""

    def train_dataloader(self) -> Any:
        trainer = self.trainer
        rows = models.token_ids(32, 8, seed=1)
        parts = trainer.distributed_sampler_kwargs  # ranks that share a model see the same
        sampler = DistributedSampler(rows, **parts, shuffle=True, seed=7)
        return StatefulDataLoader(rows, batch_size=2, sampler=sampler)


class WorkerEnvironment(LightningEnvironment):
    """Ranks as a launcher such as Ray Train hands them out: its own numbers, which Lightning cannot set."""

    creates_processes_externally = True

    def world_size(self) -> int:
        return int(os.environ["WORKERS"])

    def global_rank(self) -> int:
        return int(os.environ["WORKER"])

    local_rank = global_rank

    def set_world_size(self, size: int) -> None:
        pass

    def set_global_rank(self, rank: int) -> None:
        pass


class WorkerStrategy(FSDPLoRAStrategy):
    """As Ray Train's strategies: a worker sees one device, whatever its rank."""

    @property
    def root_device(self) -> torch.device:
        return torch.device("cpu")


def main(directory: Path, strategy: str, dies: bool) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    worker = "WORKER" in os.environ
    saving = ModelCheckpoint(directory, save_last=True, save_top_k=0, every_n_train_steps=1)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1 if worker else 2,
        strategy=WorkerStrategy() if worker else strategy,
        plugins=[WorkerEnvironment()] if worker else None,
        use_distributed_sampler=False,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=directory,
        max_epochs=EPOCHS[strategy],
        callbacks=[LoRACallback(r=4, dropout=0.1), saving],
    )
    pl.seed_everything(3, verbose=False)
    module = Reporting(str(directory), dies)
    last = directory / "last.ckpt"
    trainer.fit(module, Rows(), ckpt_path=last if last.exists() else None)
    adapters = {name: value.clone() for name, value in adapter_state_dict(module).items()}
    torch.save(adapters, directory / f"rank{trainer.global_rank}.pt")


def train_all(directory: Path, strategies: str, dies: bool = False) -> None:
    """Train with each of the strategies in a folder of its own."""
    for strategy in strategies.split(","):
        main(directory / strategy, strategy, dies)


if __name__ == "__main__":
    train_all(Path(sys.argv[1]), sys.argv[2])
