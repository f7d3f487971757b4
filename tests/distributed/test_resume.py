"""What a file must bring back on 2 gloo ranks beside adapters: a teacher that moved, the random state of a loop."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from lightning_lora import LoRACallback
from lightning_lora.checkpoint.hashes import exact_hashes
from tests import models, runs
from tests.distributed.loop import Loop, epochs_of_loop
from tests.distributed.ranks import on_ranks
from tests.distributed.training import EXACT, from_all_ranks
from tests.runs import LanguageModule, loader

MOVES = "teacher.model.layers.0.mlp.up_proj.weight"
strategies = pytest.mark.parametrize("strategy", ["ddp", "fsdp_lora"])


class Follower(LanguageModule):
    """One weight of a frozen teacher moves by a millionth in the first step, and then no more."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = models.llama().requires_grad_(False)

    def on_train_batch_end(self, outputs: Any, batch: Tensor, batch_idx: int) -> None:
        if self.global_step == 1:
            self.get_parameter(MOVES).data.mul_(1 + 1e-6)


def teacher_after(
    directory: Path, epochs: int, strategy: str = "auto", num_ranks: int = 1, ckpt_path: Path | None = None
) -> dict[str, Tensor]:
    """Train with ``last.ckpt`` in ``directory``; return the whole teacher."""
    module, saving = Follower(), ModelCheckpoint(directory, save_last=True, save_top_k=0)
    lora = LoRACallback(r=2, module="model")
    trainer = runs.trainer(directory, lora, saving, max_epochs=epochs, strategy=strategy, devices=num_ranks)
    trainer.fit(module, loader(), ckpt_path=ckpt_path)
    return {name: parameter.detach() for name, parameter in module.teacher.named_parameters()}


def moved_teacher() -> dict[str, Tensor]:
    expected = dict(Follower().teacher.named_parameters())
    expected[MOVES.removeprefix("teacher.")].mul_(1 + 1e-6)
    return expected


@on_ranks(2)
def resume_with_a_moved_teacher(directory: Path, strategy: str) -> None:
    teacher_after(directory / "first", 1, strategy, 2)
    resumed = teacher_after(directory / "second", 2, strategy, 2, directory / "first" / "last.ckpt")
    torch.testing.assert_close(resumed, moved_teacher(), **EXACT)


@strategies
def test_a_teacher_that_moved_by_a_millionth_is_in_every_later_file(tmp_path: Path, strategy: str) -> None:
    resume_with_a_moved_teacher(tmp_path, strategy)
    for name in ("first", "second"):
        saved = torch.load(tmp_path / name / "last.ckpt", weights_only=True)["state_dict"]
        assert [key for key in saved if key.startswith("teacher.")] == [MOVES]
    alone = teacher_after(tmp_path / "alone", 3, ckpt_path=tmp_path / "second" / "last.ckpt")
    torch.testing.assert_close(alone, moved_teacher(), **EXACT)


@strategies
@on_ranks(2)
def test_a_run_that_max_steps_ended_goes_on_with_the_next_batch(tmp_path: Path, strategy: str) -> None:
    def fit(num_epochs: int, ckpt_path: Path | None = None) -> tuple[pl.Trainer, list[float]]:
        pl.seed_everything(7, verbose=False)  # also of DistributedSampler's order
        torch.manual_seed(7 if ckpt_path is None else 98)
        module = LanguageModule(dropout=0.1)
        limits = {"max_epochs": -1, "max_steps": num_epochs * 4 // 2}
        lora = LoRACallback(r=2, dropout=0.2)
        trainer = runs.trainer(tmp_path, lora, strategy=strategy, devices=2, **limits)
        trainer.fit(module, loader(shuffle=True), ckpt_path=ckpt_path)
        return trainer, module.losses

    _, straight = fit(3)
    trainer, first = fit(2)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    assert len(straight) == 6
    assert first + fit(3, tmp_path / "end.ckpt")[1] == straight


class Diverging(LanguageModule):
    def on_train_end(self) -> None:
        self.model.get_parameter("model.layers.1.mlp.up_proj.lora_B").data.fill_(torch.nan)


@strategies
@on_ranks(2)
def test_nan_ends_all_ranks_before_anything_is_written(tmp_path: Path, strategy: str) -> None:
    trainer = runs.trainer(tmp_path, LoRACallback(r=2, on_nonfinite="error"), strategy=strategy, devices=2)
    trainer.fit(Diverging(), loader())
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.lora_B' holds NaN or infinity"):
        trainer.save_checkpoint(tmp_path / "nan.ckpt")
    torch.distributed.barrier()
    assert not (tmp_path / "nan.ckpt").exists()


@on_ranks(2)
def go_on_with_a_loop(directory: Path, strategy: str) -> None:
    epochs = epochs_of_loop(directory, strategy, 2)
    assert epochs["resumed"] == epochs["straight"]
    one, other = from_all_ranks(epochs["straight"])
    assert one != other


@strategies
def test_a_loop_with_dropout_goes_on_bit_for_bit(
    tmp_path: Path, strategy: str, caplog: pytest.LogCaptureFixture
) -> None:
    go_on_with_a_loop(tmp_path, strategy)
    # the file of two processes says that one draws anew
    loop = Loop("auto", 1, 5)
    before = torch.get_rng_state()
    loop.fabric.load(tmp_path / f"{strategy}.ckpt", loop.state)
    assert "written by 2 processes, this run has 1: random states are not restored" in caplog.text
    assert torch.equal(torch.get_rng_state(), before)


@on_ranks(2)
def test_a_bit_of_one_ranks_part_changes_the_hash_on_all_ranks() -> None:
    torch.distributed.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    values = torch.arange(8.0).view(4, 2)
    same, changed, swapped = (
        distribute_tensor(tensor, mesh, [Shard(0)]) for tensor in (values, values, values.roll(2, 0))
    )
    if torch.distributed.get_rank() == 1:
        changed.to_local().view(torch.int32)[-1, -1] ^= 1
    hashes = [exact_hashes({"part": part})["part"] for part in (same, changed, swapped)]
    assert len(set(hashes)) == 3
    assert from_all_ranks(hashes) == [hashes] * 2
