"""Runs that signals stop: on one rank, on all, on all with one behind, at places drawn at random, twenty times each."""

import os
import random
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor
from torch.utils.data import DistributedSampler
from torchdata.stateful_dataloader import StatefulDataLoader

from lightning_lora import LoRACallback
from tests import models, runs
from tests.distributed.ranks import on_ranks
from tests.distributed.training import EXACT, from_all_ranks, rank_of, state
from tests.runs import LanguageModule

STOPS = 20
EPOCHS, BATCHES, ACCUMULATED = 12, 6, 2
BEHIND_S = 0.1
WHERE = ("train_start", "batch_start", "backward", "step", "batch_end", "validation", "save", "epoch_end")


class Recorded(LanguageModule):
    """Keeps the loss of every batch of the run under its number."""

    def __init__(self) -> None:
        super().__init__()
        self.model = models.llama(layers=1, dropout=0.1)
        self.by_batch: dict[int, float] = {}

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.model(input_ids=batch, labels=batch).loss
        self.by_batch[self.trainer.current_epoch * BATCHES + batch_idx] = loss.item()
        return loss


class Rows(pl.LightningDataModule):
    def __init__(self, data: Any) -> None:
        super().__init__()
        self.data = data

    def train_dataloader(self) -> Any:
        parts = self.trainer.distributed_sampler_kwargs  # ranks that share a model see the same
        rows = self.data[: 2 * BATCHES * parts["num_replicas"]]
        return StatefulDataLoader(rows, batch_size=2, sampler=DistributedSampler(rows, **parts, seed=7))

    def val_dataloader(self) -> Any:
        return StatefulDataLoader(self.data[:4], batch_size=2)


class Signaller(Callback):
    """Sends this process a signal when a run passes a place for the second time, or the third."""

    def __init__(self, number: int | None, where: str, passes: int, behind_s: float) -> None:
        self.number, self.where, self.passes, self.behind_s = number, where, passes, behind_s

    def passed(self, where: str) -> None:
        if where == self.where and self.number is not None:
            self.passes -= 1
            if self.passes in (0, -1):  # once more at the next place: a second signal changes nothing
                time.sleep(self.behind_s)
                os.kill(os.getpid(), self.number)

    def on_train_start(self, *_: Any) -> None:
        self.passed("train_start")

    def on_train_batch_start(self, *_: Any) -> None:
        self.passed("batch_start")

    def on_after_backward(self, *_: Any) -> None:
        self.passed("backward")

    def on_before_optimizer_step(self, *_: Any) -> None:
        self.passed("step")

    def on_train_batch_end(self, *_: Any) -> None:
        self.passed("batch_end")

    def on_validation_batch_end(self, *_: Any) -> None:
        self.passed("validation")

    def on_save_checkpoint(self, *_: Any) -> None:
        self.passed("save")

    def on_train_epoch_end(self, *_: Any) -> None:
        self.passed("epoch_end")


def fit(directory: Path, strategy: str, ckpt_path: Path | None, *callbacks: Callback) -> Recorded:
    pl.seed_everything(3, verbose=False)
    module = Recorded()
    saving = ModelCheckpoint(directory / "steps", save_last=True, save_top_k=0, every_n_train_steps=2)
    trainer = runs.trainer(
        directory,
        LoRACallback(r=4, dropout=0.1),
        *callbacks,
        saving,
        devices=2,
        strategy=strategy,
        plugins=[SLURMEnvironment()],
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        max_epochs=EPOCHS,
        accumulate_grad_batches=ACCUMULATED,
        val_check_interval=4,
    )
    with suppress(SIGTERMException):
        trainer.fit(module, Rows(models.token_ids(64, 8, seed=1)), ckpt_path=ckpt_path)
    return module


def fit_until_it_ends(directory: Path, strategy: str, who: str) -> tuple[Recorded, list[tuple[str, str, int]]]:
    """Stop a run at places drawn at random, resume it each time, and let it end; return it, and its stops."""
    draw, (rank, _) = random.Random(who), rank_of()
    behind_s = BEHIND_S if who == "straggler" and rank == 1 else 0.0
    losses: dict[int, float] = {}
    stops: list[tuple[str, str, int]] = []
    ckpt_path: Path | None = None
    while True:
        kind, where = draw.choice(("SIGTERM", "SIGUSR1")), draw.choice(WHERE)
        signalled = who != "one" or rank == draw.randrange(2)
        number = getattr(signal, kind) if signalled and len(stops) < STOPS else None
        signaller = Signaller(number, where, 1, behind_s)
        module = fit(directory, strategy, ckpt_path, signaller, OnExceptionCheckpoint(directory))
        losses.update(module.by_batch)
        if not module.trainer.received_sigterm:
            module.by_batch = losses
            return module, stops
        stops.append((kind, where, module.trainer.global_step))
        name = "on_exception.ckpt"
        if kind == "SIGUSR1":
            name = f"hpc_ckpt_{len((directory / 'requeued.txt').read_text().splitlines())}.ckpt"
        ckpt_path = directory / name


def counted(trainer: pl.Trainer) -> list[int]:
    loop = trainer.fit_loop.epoch_loop
    return [trainer.global_step, trainer.current_epoch, loop.batch_progress.total.completed, loop._batches_that_stepped]


def be_a_task_of_slurm(directory: Path) -> None:
    """Set SLURM's variables, and let ``scontrol`` write what it is told into ``requeued.txt`` in the directory."""
    rank = os.environ["RANK"]
    slurm = {"PROCID": rank, "LOCALID": rank, "NODEID": "0", "NTASKS": "2", "NTASKS_PER_NODE": "2", "JOB_ID": "4711"}
    os.environ.update({f"SLURM_{key}": value for key, value in slurm.items()} | {"SLURM_JOB_NAME": "train"})
    os.environ["PATH"] = f"{directory}:{os.environ['PATH']}"
    os.environ["REQUEUED"] = str(directory / "stopped" / "requeued.txt")


@pytest.fixture
def scontrol(tmp_path: Path) -> None:
    (tmp_path / "scontrol").write_text('#!/bin/sh\necho "$@" >> "$REQUEUED"\n')
    (tmp_path / "scontrol").chmod(0o755)


@pytest.mark.usefixtures("scontrol")
@pytest.mark.parametrize("who", ["one", "all", "straggler"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp_lora", "megatron_lora"])
@on_ranks(2)
def test_every_signal_stops_all_ranks_at_one_step_and_the_run_ends_like_an_undisturbed_one(
    tmp_path: Path, strategy: str, who: str
) -> None:
    be_a_task_of_slurm(tmp_path)
    undisturbed = fit(tmp_path / "undisturbed", strategy, None)
    module, stops = fit_until_it_ends(tmp_path / "stopped", strategy, who)

    assert len(stops) == STOPS
    assert from_all_ranks(stops) == [stops, stops]

    assert counted(module.trainer) == counted(undisturbed.trainer)
    assert module.trainer.global_step == EPOCHS * BATCHES // ACCUMULATED
    assert module.by_batch == undisturbed.by_batch
    assert len(module.by_batch) == EPOCHS * BATCHES
    torch.testing.assert_close(state(module), state(undisturbed), **EXACT)

    # SLURM's signal requeues the job once
    requeued = (tmp_path / "stopped" / "requeued.txt").read_text().splitlines()
    assert requeued == ["requeue 4711"] * sum(kind == "SIGUSR1" for kind, _, _ in stops)
    assert requeued
