"""Correct the counts of a loaded checkpoint, so that a resumed run begins with the next batch.

Lightning counts epochs and batches as ready, started, processed and completed, and concludes at a resume from these
counts in which hook the file was written. Three files mislead it: of a run that was ended in the middle of an epoch,
which counts the epoch as done; of an epoch that is done, for a run that ``max_steps`` limits; and of an epoch's last
batch, whose next epoch is not begun but gone on with.
"""

from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.rank_zero import rank_zero_info

from lightning_lora.compat.lightning import clear_restarting, train_loader, uncount_saved_batch


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


def say_what_repeats(trainer: "pl.Trainer") -> bool:
    """Return whether a resumed run goes on inside an epoch, and log which batches it repeats or leaves out."""
    progress = trainer.fit_loop.epoch_loop.batch_progress.current
    total = trainer.num_training_batches
    if any(config.reduce_on_plateau for config in trainer.lr_scheduler_configs) and trainer.fit_loop.restarting:
        rank_zero_info("Lightning skips one step of ReduceLROnPlateau when it resumes at an epoch's end")
    if not trainer.fit_loop.restarting or progress.ready == 0 or progress.ready >= total:
        return False
    if accumulated := progress.ready % trainer.accumulate_grad_batches:
        rank_zero_info(
            f"Resuming after {accumulated} of {trainer.accumulate_grad_batches} accumulated batches: their gradients "
            "are not in the file, so the first step is made of the others"
        )
    loader = train_loader(trainer)
    loaders = [] if loader is None else loader.flattened
    if not all(hasattr(one, "state_dict") and hasattr(one, "load_state_dict") for one in loaders):
        left = f"{int(total - progress.ready)} of {int(total)}" if total != float("inf") else "remaining"
        rank_zero_info(
            f"Resuming after batch {progress.ready} of epoch {trainer.current_epoch} with a dataloader that keeps no "
            f"position: it starts at its first batch again for the {left} batches left, so batches repeat and others "
            "are not seen in this epoch. torchdata.stateful_dataloader.StatefulDataLoader resumes exactly"
        )
    return True
