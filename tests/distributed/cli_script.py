"""One of two ranks of a LightningCLI run under ``fsdp_lora`` whose optimizer and schedule the command line names."""

import sys
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.cli import LightningCLI
from torch import Tensor, nn

from lightning_lora import adapter_state_dict
from tests import models
from tests.distributed.launch import report
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


def train(cls: type, directory: Path, *arguments: str) -> LightningCLI:
    quiet = ["logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"]
    return LightningCLI(
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
            "--optimizer=AdamW",
            "--optimizer.lr=0.01",
            "--optimizer.eps=0.0001",
            "--lr_scheduler=StepLR",
            "--lr_scheduler.step_size=1",
            *arguments,
        ],
    )


def main(directory: Path) -> None:
    sys.argv = sys.argv[:1]
    found = {}
    for cls in (Eager, Lazy):
        cli = train(cls, directory / cls.__name__, "--trainer.strategy=fsdp_lora", "--trainer.devices=2")
        found[cls.__name__] = {name: value.clone() for name, value in adapter_state_dict(cli.model).items()}
    report(directory, found)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
