"""Correct where a checkpoint says that its run stood, so that a resume begins with the next batch.

Lightning counts epochs and batches as ready, started, processed and completed, and concludes at a resume from these
counts in which hook the file was written. Three files mislead it: of a run that was ended in the middle of an epoch,
which counts the epoch as done; of an epoch that is done, for a run that ``max_steps`` limits; and of an epoch's last
batch, whose next epoch is not begun but gone on with.
"""

from typing import Any

import lightning.pytorch as pl

from lightning_lora.compat.lightning import clear_restarting, uncount_saved_batch


def correct_progress(fit_loop: dict[str, Any], accumulate_grad_batches: int) -> None:
    """Set the counts of a loaded file whose epoch was ended halfway to those that ``on_train_batch_end`` writes.

    Of an epoch's last batch, the position of stateful dataloaders is dropped: they would go on behind their last batch,
    or shuffle by a state that an uninterrupted run has left behind.
    """
    epoch, batch = fit_loop["epoch_progress"], fit_loop["epoch_loop.batch_progress"]
    if batch["is_last_batch"]:
        fit_loop["state_dict"].pop("combined_loader", None)
    elif batch["current"]["ready"] > 0 and epoch["total"]["processed"] == epoch["total"]["ready"]:
        for counts in (epoch["total"], epoch["current"]):
            counts["processed"] = counts["completed"] = counts["ready"] - 1
        for counts in (batch["total"], batch["current"]):
            if counts["completed"] == counts["ready"]:
                counts["completed"] -= 1
        if batch["current"]["ready"] % accumulate_grad_batches == 0:
            uncount_saved_batch(fit_loop)


def begin_after_finished_epoch(trainer: "pl.Trainer") -> None:
    """Let a resumed run that ``max_steps`` limits begin the next epoch if the loaded one is done, as other runs do."""
    epoch: Any = trainer.fit_loop.epoch_progress.current
    if epoch.ready == epoch.started == epoch.processed:
        clear_restarting(trainer.fit_loop)


def begin_after_last_batch(trainer: "pl.Trainer") -> None:
    """Let a run that was resumed behind an epoch's last batch begin the next one. Called at ``on_train_start``."""
    fit_loop = trainer.fit_loop
    batch_loop = fit_loop.epoch_loop
    if (
        fit_loop.restarted_mid_epoch
        and batch_loop.restarted_on_train_batch_end
        and batch_loop.batch_progress.is_last_batch
    ):
        fit_loop.reset_restart_stage()
