"""One rank fails, stops, or has fewer batches: every rank ends with an error that says which rank did what."""

import fcntl
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, OnExceptionCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_lora import LoRACallback
from lightning_lora.distributed import notes
from tests import models, runs
from tests.distributed.ranks import on_ranks
from tests.distributed.training import rank_of
from tests.runs import LanguageModule


class Odd(LanguageModule):
    """Does something in the second batch, on rank 1 alone, or in a validation on rank 0 alone."""

    def __init__(self, case: str) -> None:
        super().__init__()
        self.case = case

    def does(self, case: str, rank: int) -> bool:
        return self.case == case and self.global_rank == rank and self.global_step == 1

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if self.does("step", 1) or (self.case == "both" and batch_idx == 1):
            raise ValueError("a batch of rank 1")
        if self.does("interrupt", 1):
            raise KeyboardInterrupt
        if self.does("stop", 1):
            self.trainer.should_stop = True
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        if self.case == "validation" and self.global_rank == 0 and self.global_step == 3:
            raise ValueError("a row of rank 0")
        super().validation_step(batch, batch_idx)


class OddCallback(Callback):
    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
        if module.does("callback", 0):
            raise OSError("the disk of rank 0")


@dataclass
class End:
    """How a run ended on this rank."""

    error: BaseException | None
    warnings: list[str]
    num_steps: int
    path: Path  # of what OnExceptionCheckpoint saves


def end_of_run(directory: Path, strategy: str, case: str) -> End:
    notes.PATIENCE_S = 1.0
    rank, _ = rank_of()
    batches = 2 if case == "loader" and rank == 1 else 3
    # ranks that share a model see the same batches
    seed = 1 if strategy == "megatron_lora" else 1 + rank
    loader = DataLoader(models.token_ids(2 * batches, 8, seed=seed), batch_size=2)
    trainer = runs.trainer(
        directory,
        LoRACallback(r=4),
        OddCallback(),
        OnExceptionCheckpoint(directory),
        devices=2,
        strategy=strategy,
        use_distributed_sampler=False,
        enable_checkpointing=True,
        num_sanity_val_steps=0,
        max_epochs=2,
        limit_train_batches=2 if case == "limit" and rank == 0 else 3,
        limit_val_batches=1 + rank if case == "rows" else None,
    )
    raised: BaseException | None = None
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            trainer.fit(Odd(case), loader, loader)
        except BaseException as error:
            raised = error
    return End(raised, [str(one.message) for one in said], trainer.global_step, directory / "on_exception.ckpt")


def assert_other_rank_was_told(end: End, failed: int, error: type, words: str, where: str) -> None:
    rank, _ = rank_of()
    if rank == failed:
        assert type(end.error) is error
        assert str(end.error) == words
    else:
        assert type(end.error) is RuntimeError
        told = f"rank {failed} raised {error.__name__}: {words} ({where}). Rank {rank} was waiting"
        assert str(end.error).startswith(told)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp_lora"])
@on_ranks(2)
def test_a_failed_step_is_told_and_nothing_is_made_of_gradients_that_were_not_reduced(
    tmp_path: Path, strategy: str
) -> None:
    end = end_of_run(tmp_path, strategy, "step")
    assert_other_rank_was_told(end, 1, ValueError, "a batch of rank 1", "in batch 1 of epoch 0")
    assert end.num_steps == 1
    if strategy == "ddp" and rank_of()[0] == 0:  # it holds all of the model, and saves it
        assert torch.load(end.path, weights_only=True)["global_step"] == 1
    if strategy == "fsdp_lora":
        assert not end.path.exists()
        if rank_of()[0] == 0:
            assert any("was not written" in warning for warning in end.warnings)


@pytest.mark.parametrize("strategy", ["ddp", "megatron_lora"])
@on_ranks(2)
def test_a_failed_callback_is_told(tmp_path: Path, strategy: str) -> None:
    end = end_of_run(tmp_path, strategy, "callback")
    assert_other_rank_was_told(end, 0, OSError, "the disk of rank 0", "in batch 0 of epoch 0")


@on_ranks(2)
def test_a_failed_validation_is_told(tmp_path: Path) -> None:
    end = end_of_run(tmp_path, "fsdp_lora", "validation")
    assert_other_rank_was_told(end, 0, ValueError, "a row of rank 0", "in the validation of epoch 0")


@on_ranks(2)
def test_an_interrupt_of_one_rank_is_told(tmp_path: Path) -> None:
    end = end_of_run(tmp_path, "ddp", "interrupt")
    if rank_of()[0] == 1:
        assert type(end.error) is SystemExit  # Lightning's answer to an interrupt
    else:
        told = "rank 1 raised KeyboardInterrupt (in batch 1 of epoch 0). Rank 0 was waiting"
        assert str(end.error).startswith(told)


SHORT = {
    "loader": ("rank 0 begins batch 2 of epoch 0", "rank 1 validates after 2 batches of epoch 0 (it has no more)"),
    "limit": ("rank 0 validates after 2 batches of epoch 0 (it has no more)", "rank 1 begins batch 2 of epoch 0"),
    "stop": (
        "rank 0 begins batch 2 of epoch 0",
        "rank 1 validates after 2 batches of epoch 0 (trainer.should_stop is set on it)",
    ),
}
SHORT_RUNS = {"ddp": ("loader", "limit", "stop"), "fsdp_lora": ("loader", "stop"), "megatron_lora": ("limit", "stop")}


@pytest.mark.parametrize(("strategy", "case"), [(one, case) for one, cases in SHORT_RUNS.items() for case in cases])
@on_ranks(2)
def test_ranks_at_different_batches_are_told_where_all_are(tmp_path: Path, strategy: str, case: str) -> None:
    end = end_of_run(tmp_path, strategy, case)
    assert type(end.error) is RuntimeError
    assert str(end.error).startswith(f"the ranks are at different batches: {'; '.join(SHORT[case])}. Give every")


@on_ranks(2)
def test_ranks_that_share_a_model_must_evaluate_as_many_batches(tmp_path: Path) -> None:
    end = end_of_run(tmp_path, "megatron_lora", "rows")
    assert "ranks that share a model have different numbers of batches to evaluate: [[1], [2]]" in str(end.error)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp_lora", "megatron_lora"])
@on_ranks(2)
def test_ranks_that_fail_alike_still_save_together(tmp_path: Path, strategy: str) -> None:
    end = end_of_run(tmp_path, strategy, "both")
    assert str(end.error) == "a batch of rank 1"
    if rank_of()[0] == 0:
        saved = torch.load(end.path, weights_only=True)
        assert saved["global_step"] == 1
        assert len(saved["lightning_lora"]["random_states"]) == 2


@on_ranks(2)
def fail_on_rank_1_whose_script_goes_on(directory: Path, strategy: str) -> None:
    notes.END_S = 1.0
    with (directory / "lock").open("w") as lock:
        if rank_of()[0] == 0:
            fcntl.flock(lock, fcntl.LOCK_EX)  # the system lets go of it when the process ends
        end_of_run(directory, strategy, "step")
        fcntl.flock(lock, fcntl.LOCK_EX)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp_lora"])
def test_a_rank_ends_that_waits_for_one_whose_script_goes_on(tmp_path: Path, strategy: str) -> None:
    with pytest.raises(AssertionError, match=r"ranks \[0\] failed with \[1, 0\]") as failed:
        fail_on_rank_1_whose_script_goes_on(tmp_path, strategy)
    words = "rank 1 raised ValueError: a batch of rank 1 (in batch 1 of epoch 0). Rank 0 waits for it in vain and ends"
    assert words in str(failed.value)
