"""Signals in a run of one process: it ends after the optimizer step, and goes on exactly from the file."""

import os
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, OnExceptionCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torchdata.stateful_dataloader import StatefulDataLoader

from lightning_lora import LoRACallback
from tests import models
from tests.runs import LanguageModule, same_adapters, trainer

BATCHES, ACCUMULATED = 6, 2


class Signalled(Callback):
    """Receives SIGTERM in a batch of the run, counted from 0."""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_train_batch_start(self, run: Any, *_: Any) -> None:
        if run.fit_loop.epoch_loop.total_batch_idx == self.batch:
            os.kill(os.getpid(), signal.SIGTERM)


def run_of(directory: Path, ckpt_path: Path | None, *callbacks: Callback, **settings: Any) -> LanguageModule:
    torch.manual_seed(0)
    module = LanguageModule()
    run = trainer(
        directory,
        LoRACallback(r=4, dropout=0.1),
        *callbacks,
        max_epochs=2,
        accumulate_grad_batches=ACCUMULATED,
        num_sanity_val_steps=0,
        enable_checkpointing=True,
        **settings,
    )
    loaders = [StatefulDataLoader(models.token_ids(2 * BATCHES, 8), batch_size=2, shuffle=True) for _ in range(2)]
    with suppress(SIGTERMException):
        run.fit(module, *loaders, ckpt_path=ckpt_path)
    return module


NEVER, EVERY_STEP = {"limit_val_batches": 0}, {"val_check_interval": ACCUMULATED}


@pytest.mark.filterwarnings("ignore:.*ckpt_path")  # since a callback could have left a file
@pytest.mark.parametrize(
    ("batch", "step", "settings"), [(0, 1, NEVER), (5, 3, NEVER), (2, 2, EVERY_STEP), (5, 3, EVERY_STEP), (5, 3, {})]
)
def test_a_run_goes_on_exactly_from_the_step_it_stopped_after(
    tmp_path: Path, batch: int, step: int, settings: dict[str, Any]
) -> None:
    whole = run_of(tmp_path / "whole", None, **settings)
    path = tmp_path / "stopped"
    stopped = run_of(path, None, Signalled(batch), OnExceptionCheckpoint(path), **settings)
    assert (stopped.trainer.global_step, stopped.trainer.received_sigterm) == (step, True)
    resumed = run_of(tmp_path / "resumed", path / "on_exception.ckpt", **settings)
    assert stopped.losses + resumed.losses == whole.losses
    assert same_adapters(resumed, whole)
    counters = [one.trainer.fit_loop.epoch_loop._batches_that_stepped for one in (resumed, whole)]
    assert counters == [2 * BATCHES // ACCUMULATED] * 2


@pytest.mark.filterwarnings("ignore:.*ckpt_path")
def test_a_signal_in_the_last_step_lets_the_run_end_by_itself(tmp_path: Path) -> None:
    module = run_of(tmp_path, None, Signalled(2 * BATCHES - 1), OnExceptionCheckpoint(tmp_path))
    assert module.trainer.state.finished
    assert not module.trainer.received_sigterm


@pytest.mark.filterwarnings("ignore:.*ckpt_path")
def test_a_run_that_is_signalled_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run_of(tmp_path, None, Signalled(0))
    (record,) = [one for one in caplog.records if "Received SIGTERM: 15" in one.message]
    assert record.name.startswith("lightning.pytorch.")  # the logger that Lightning gives a handler


def test_the_handlers_of_the_script_are_back_after_a_run(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    run_of(tmp_path, None, Signalled(0))
    assert signal.getsignal(signal.SIGTERM) is before
