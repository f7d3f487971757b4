"""LightningCLI on two ranks under ``fsdp_lora``: an optimizer that the command line names trains the adapters."""

import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.cli import LightningCLI
from torch import Tensor, nn

from tests import models
from tests.distributed.ranks import on_ranks
from tests.distributed.training import STEP_TOLERANCE, state
from tests.runs import loader


class Lazy(pl.LightningModule):
    """A tiny Llama that ``configure_model`` builds, and no optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.model: nn.Module | None = None

    def configure_model(self) -> None:
        if self.model is None:
            self.model = models.llama()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.model(input_ids=batch, labels=batch).loss


class Eager(Lazy):
    """The same, built in ``__init__``."""

    def __init__(self) -> None:
        super().__init__()
        self.model = models.llama()

    configure_model = pl.LightningModule.configure_model


class Data(pl.LightningDataModule):
    """The same rows on every rank, so that the mean of the gradients is that of one process."""

    def train_dataloader(self) -> object:
        return loader()


def adapters_after(cls: type, directory: Path, *arguments: str) -> dict[str, Tensor]:
    quiet = ["logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"]
    cli = LightningCLI(
        cls,
        Data,
        seed_everything_default=0,
        args=[
            "fit",
            *(f"--trainer.{name}=false" for name in quiet),
            f"--trainer.default_root_dir={directory}",
            "--trainer.accelerator=cpu",
            "--trainer.max_epochs=2",
            "--trainer.use_distributed_sampler=false",
            "--trainer.callbacks+=lightning_lora.LoRACallback",
            "--trainer.callbacks.r=4",
            "--optimizer=torch.optim.AdamW",
            "--optimizer.lr=0.01",
            "--optimizer.eps=0.0001",
            "--lr_scheduler=StepLR",
            "--lr_scheduler.step_size=1",
            *arguments,
        ],
    )
    return state(cli.model)


@pytest.fixture
def single(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    monkeypatch.setattr(sys, "argv", ["cli"])
    return adapters_after(Eager, tmp_path / "single", "--trainer.devices=1")


@on_ranks(2)
def test_an_optimizer_of_the_command_line_trains_as_on_one_process(tmp_path: Path, single: dict[str, Tensor]) -> None:
    sys.argv = ["cli"]
    for cls in (Eager, Lazy):
        adapters = adapters_after(cls, tmp_path / cls.__name__, "--trainer.strategy=fsdp_lora", "--trainer.devices=2")
        torch.testing.assert_close(adapters, single, **STEP_TOLERANCE)
