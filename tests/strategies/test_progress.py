"""A resumed run goes on with the next batch and no other, wherever and however the file was written."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from lightning_lora import LoRACallback
from tests import models
from tests.runs import trainer

BATCHES = 4


class Recorded(pl.LightningModule):
    """Notes every batch and validation: where it stands, what it holds, and the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.net = models._seeded(lambda: nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.2), nn.Linear(8, 1)))
        self.steps: list[tuple[Any, ...]] = []
        self.epochs: list[int] = []
        self.validations: list[tuple[int, int]] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = self.net(batch[0]).square().mean()
        where = (
            self.current_epoch,
            batch_idx,
            self.global_step,
            self.trainer.fit_loop.epoch_loop._batches_that_stepped,
        )
        self.steps.append((*where, batch[0].sum().item(), loss.item(), self.lr_schedulers().get_last_lr()))
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.validations.append((self.current_epoch, self.global_step))

    def on_train_epoch_start(self) -> None:
        self.epochs.append(self.current_epoch)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


class StopAfter(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        trainer.should_stop = trainer.global_step >= self.step


def rows(count: int) -> TensorDataset:
    return TensorDataset(torch.randn(count, 4, generator=torch.Generator().manual_seed(1)))


def fit(directory: Path, seed: int, *callbacks: Any, validate: bool = True, ckpt_path: Any = None, **settings: Any):
    pl.seed_everything(seed, verbose=False)
    module = Recorded()
    run = trainer(
        directory,
        LoRACallback(r=2, target_modules=["0"]),
        *callbacks,
        **{"max_epochs": 3, "num_sanity_val_steps": 0, **settings},
    )
    data = StatefulDataLoader(rows(4 * BATCHES), batch_size=4, shuffle=True)
    run.fit(module, data, DataLoader(rows(4), batch_size=4) if validate else None, ckpt_path=ckpt_path)
    return run, module


LIMITED = {"max_epochs": -1, "max_steps": 3 * BATCHES}
ENDS = {
    "max_steps": {"max_steps": BATCHES},
    "max_steps_of_two_epochs": {"max_steps": 2 * BATCHES},
    "max_epochs": {"max_epochs": 1},
    "both": {"max_epochs": 1, "max_steps": BATCHES},
    "max_steps_halfway": {"max_steps": 6},
}


def assert_equal_to_straight(straight: Recorded, *parts: Recorded) -> None:
    steps = [step for part in parts for step in part.steps]
    assert [step[:4] for step in steps] == [step[:4] for step in straight.steps]
    assert steps == straight.steps
    assert [epoch for part in parts for epoch in part.epochs] == straight.epochs
    assert [one for part in parts for one in part.validations] == straight.validations


@pytest.fixture(params=[False, True], ids=["", "validated"])
def validate(request: pytest.FixtureRequest) -> Iterator[bool]:
    return request.param


@pytest.mark.parametrize("common", [{}, LIMITED], ids=["max_epochs", "max_steps"])
@pytest.mark.parametrize("end", list(ENDS.values()), ids=list(ENDS))
class TestSavedAfterwards:
    def test_goes_on_with_the_next_batch(self, tmp_path: Path, common: Any, end: Any, validate: bool) -> None:
        _, straight = fit(tmp_path, 7, validate=validate, **common)
        run, first = fit(tmp_path, 7, validate=validate, **{**common, **end})
        torch.randn(3)  # what a script does before it saves is not the run's
        run.save_checkpoint(tmp_path / "x.ckpt")
        _, second = fit(tmp_path, 99, validate=validate, ckpt_path=tmp_path / "x.ckpt", **common)
        assert_equal_to_straight(straight, first, second)


@pytest.mark.parametrize("common", [{}, LIMITED], ids=["max_epochs", "max_steps"])
@pytest.mark.parametrize("every", [{}, {"every_n_train_steps": BATCHES}], ids=["epoch", "steps"])
def test_files_of_an_epochs_last_batch_begin_the_next_epoch(
    tmp_path: Path, common: Any, every: Any, validate: bool
) -> None:
    _, straight = fit(tmp_path, 7, validate=validate, **common)
    saving = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{step}", **every)
    _, whole = fit(tmp_path, 7, saving, validate=validate, **common)
    again = ModelCheckpoint(tmp_path / "b", save_top_k=-1, filename="{step}", **every)
    _, second = fit(tmp_path, 98, again, validate=validate, ckpt_path=tmp_path / "step=4.ckpt", **common)
    _, third = fit(tmp_path, 99, validate=validate, ckpt_path=tmp_path / "b" / "step=8.ckpt", **common)
    for resumed, done in ((second, 1), (third, 2)):  # a resume of a resumed run, too
        assert resumed.steps == straight.steps[done * BATCHES :]
        assert resumed.epochs == straight.epochs[done:]
        assert resumed.validations == straight.validations[-len(resumed.validations) :] or not validate
    assert whole.steps == straight.steps


def test_accumulated_batches_are_counted_once(tmp_path: Path) -> None:
    common = {"accumulate_grad_batches": 2, "max_epochs": 3}
    _, straight = fit(tmp_path, 7, **common)
    run, first = fit(tmp_path, 7, **{**common, "max_steps": 3})
    run.save_checkpoint(tmp_path / "x.ckpt")
    _, second = fit(tmp_path, 99, ckpt_path=tmp_path / "x.ckpt", **common)
    assert_equal_to_straight(straight, first, second)


@pytest.mark.parametrize("step", [BATCHES, 6])
def test_a_stopped_run_goes_on(tmp_path: Path, step: int) -> None:
    _, straight = fit(tmp_path, 7, validate=False)
    run, first = fit(tmp_path, 7, StopAfter(step), validate=False)
    run.save_checkpoint(tmp_path / "x.ckpt")
    _, second = fit(tmp_path, 99, validate=False, ckpt_path=tmp_path / "x.ckpt")
    assert_equal_to_straight(straight, first, second)
    assert len(first.steps) == step
