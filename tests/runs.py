"""Small Lightning runs: a module, its data, and a Trainer that is quiet and leaves its files where it is told."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_lora import LoRACallback, adapter_state_dict
from tests import models

ROWS = 16


class LanguageModule(pl.LightningModule):
    """A tiny Llama under ``model``, a loss that is remembered, AdamW and a schedule."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = models.llama(dropout=dropout)
        self.losses: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.model(input_ids=batch, labels=batch).loss
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.model(input_ids=batch, labels=batch).loss, sync_dist=True)

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("test_loss", self.model(input_ids=batch, labels=batch).loss, sync_dist=True)

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.model(input_ids=batch).logits

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


class LazyModule(LanguageModule):
    """The same, built in ``configure_model``."""

    def __init__(self) -> None:
        pl.LightningModule.__init__(self)
        self.model: nn.Module | None = None
        self.losses = []

    def configure_model(self) -> None:
        if self.model is None:
            self.model = models.llama()


class ClassifierModule(pl.LightningModule):
    """A hand-written encoder under ``backbone``, a head of the user's outside it, and a batch norm in the head."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = models.encoder()
        self.task = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
        self.teacher = models._seeded(lambda: nn.Linear(3, 3)).requires_grad_(False)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.task(self.backbone(batch)), batch[:, 0] % 2)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def loader(shuffle: bool = False, rows: int = ROWS, batch_size: int = 4) -> "DataLoader[Tensor]":
    return DataLoader(models.token_ids(rows, 8, seed=1), batch_size=batch_size, shuffle=shuffle)


def trainer(directory: Path, *callbacks: Any, **settings: Any) -> pl.Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        "default_root_dir": directory,
    }
    return pl.Trainer(callbacks=list(callbacks), **{**defaults, **settings})


def fitted(directory: Path, module: pl.LightningModule | None = None, **lora: Any) -> tuple[pl.Trainer, Any]:
    """Train one epoch with ``last.ckpt`` in ``directory``."""
    module = module or LanguageModule()
    callback = ModelCheckpoint(directory, save_last=True, save_top_k=0)
    run = trainer(directory, LoRACallback(**{"r": 4, **lora}), callback)
    run.fit(module, loader())
    return run, module


def same_adapters(one: nn.Module, other: nn.Module) -> bool:
    ours, theirs = adapter_state_dict(one), adapter_state_dict(other)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def epochs(directory: Path, **settings: Any) -> ModelCheckpoint:
    """Return a callback that keeps the file of every epoch."""
    return ModelCheckpoint(directory, save_top_k=-1, filename="{epoch}", **settings)
