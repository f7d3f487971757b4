"""Trainer runs on ranks whose every step sees what one process would see, and what is kept of them."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_lora import LoRACallback, adapter_state_dict, named_adapter_parameters
from tests import models
from tests.graph import joint_functions
from tests.runs import ROWS, LanguageModule

BATCH = 4
# lr 1e-2 / eps 1e-4 turns a rounding of 1e-8 in a gradient into 1e-6 per step, and there are eight
STEP_TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}
GRADIENT_TOLERANCE = {"rtol": 1e-4, "atol": 1e-7}  # other order of sums
EXACT = {"rtol": 0.0, "atol": 0.0}
PROMPTS = models.token_ids(4, 5, seed=3)
SHARDED = {"min_shard_numel": 1000}  # of FSDPLoRAStrategy: the tiny model's embedding and head are sharded too


class Recorded(LanguageModule):
    """Keeps the gradients of the first step, and which functions computed its loss."""

    def on_before_backward(self, loss: Tensor) -> None:
        if not hasattr(self, "functions"):
            self.functions = joint_functions(loss)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if not hasattr(self, "gradients"):
            self.gradients = {name: p.grad.clone() for name, p in named_adapter_parameters(self)}

    def configure_optimizers(self) -> Any:
        # a larger eps than usual: Adam would turn the rounding of a gradient near zero into a whole step
        return torch.optim.AdamW(self.parameters(), lr=1e-2, eps=1e-4)


class Finetuned(Recorded):
    """Steps by itself after two backwards, and keeps the norm of the gradients before each step."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.norms: list[float] = []

    def norm(self) -> float:
        return sum(p.grad.square().sum().item() for p in self.parameters() if p.grad is not None)

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        optimizer = self.optimizers()
        for _ in range(2):  # two backwards before one step
            self.manual_backward(self.model(input_ids=batch, labels=batch).loss / 2)
        self.norms.append(self.norm())
        optimizer.step()
        optimizer.zero_grad()


def rank_of() -> tuple[int, int]:
    """Return this process's rank, and how many there are."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def rank_loader(rank: int, num_ranks: int) -> "DataLoader[Tensor]":
    """Return a rank's rows of every global batch, so that a step sees what one process would see."""
    rows = models.token_ids(ROWS, 8, seed=1)
    mine = torch.cat([batch.chunk(num_ranks)[rank] for batch in rows.split(BATCH)])
    return DataLoader(mine, batch_size=BATCH // num_ranks)


def fit(
    directory: Path | None,
    module: pl.LightningModule,
    strategy: Any = "fsdp_lora",
    *,
    lora: dict[str, Any] | None = None,
    loaders: dict[str, Any] | None = None,
    ckpt_path: Any = None,
    callbacks: tuple[Any, ...] = (),
    **settings: Any,
) -> pl.Trainer:
    """Train on this rank's rows, with a checkpoint per epoch in ``directory``, if there is one."""
    rank, num_ranks = rank_of()
    lora = lora or {}
    saving = [] if directory is None else [ModelCheckpoint(directory, save_top_k=-1, filename="{epoch}")]
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=num_ranks,
        strategy=strategy,
        use_distributed_sampler=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=bool(saving),
        default_root_dir=directory,
        callbacks=[LoRACallback(**(lora if "adapters" in lora else {"r": 4, **lora})), *saving, *callbacks],
        **{"max_epochs": 1, "logger": False, "log_every_n_steps": 1, **settings},
    )
    trainer.fit(module, **{"train_dataloaders": rank_loader(rank, num_ranks), **(loaders or {})}, ckpt_path=ckpt_path)
    return trainer


def alone(module: Any = None, directory: Path | None = None, **settings: Any) -> Any:
    """Return a module after a run on one process."""
    module = module or Recorded()
    fit(directory, module, "auto", **settings)
    return module


def state(module: pl.LightningModule) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in adapter_state_dict(module).items()}


def optimizer_state(module: pl.LightningModule) -> list[dict[str, Tensor]]:
    """Return the moments of every parameter, in the order of the optimizer."""
    optimizer = module.trainer.optimizers[0]
    return [
        {name: value.clone() for name, value in optimizer.state[parameter].items()}
        for group in optimizer.param_groups
        for parameter in group["params"]
    ]


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed everything, for the block: what is set in the environment would seed later tests' runs, too."""
    pl.seed_everything(seed, verbose=False)
    yield
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        os.environ.pop(name, None)


def error_of(act: Callable[..., Any], *arguments: Any, **settings: Any) -> str:
    """Return the message of the error that a call raises."""
    try:
        act(*arguments, **settings)
    except (ValueError, RuntimeError) as error:
        return str(error)
    return "none"


def from_all_ranks(value: Any) -> list[Any]:
    """Return what each rank has here, on every rank."""
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values
