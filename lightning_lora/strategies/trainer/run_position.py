"""Save and restore where a Trainer's run stands: random generators, dataloaders, and the counts of batches.

Lightning counts epochs and batches as ready, started, processed and completed, and concludes at a resume from these
counts in which hook the file was written. Three files mislead it: of a run that was ended in the middle of an epoch,
which counts the epoch as done; of an epoch that is done, for a run that ``max_steps`` limits; and of an epoch's last
batch, whose next epoch is not begun but gone on with.
"""

from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.rank_zero import rank_zero_info
from torch import Tensor

from lightning_lora.checkpoint import random_state
from lightning_lora.compat.lightning import (
    clear_restarting,
    loader_states,
    set_epoch,
    train_loader,
    uncount_saved_batch,
)


class RunPosition:
    """What a checkpoint keeps of a run beside tensors and counts, so that a resumed run draws the same numbers.

    Args:
        strategy: of the run; it says which of the saved states is this rank's.
    """

    def __init__(self, strategy: Any) -> None:
        self._strategy = strategy
        self._loaded: list[dict[str, Any]] | None = None  # states of all ranks, until the resumed run is under way
        self._loaders: list[list[Tensor]] | None = None  # of this rank, still to be restored
        self._saved: list[dict[str, Any]] | None = None  # the same, whatever the number of ranks
        self._at_first_epoch: dict[str, Any] | None = None
        self._noted: dict[str, Any] | None = None  # at the last batch
        self._loader_states: list[dict[str, Any]] | None = None
        self._is_over = False

    @property
    def _train_loader(self) -> Any:
        return train_loader(self._strategy.lightning_module.trainer)

    def note(self) -> None:
        """Note the states before a save draws any numbers; stateful dataloaders may. After the run's end do nothing."""
        if not self._is_over:
            self._noted = self._collect()

    def note_end(self) -> None:
        """Note the states at the run's end for files that are written later, when its dataloaders have lost theirs."""
        self._noted = self._collect()
        self._at_first_epoch = None
        combined = self._train_loader
        self._loader_states = None if combined is None else loader_states(combined)
        self._is_over = True

    def add_to(self, checkpoint: dict[str, Any], section: dict[str, Any], num_ranks: int) -> None:
        """Put all ranks' states into a checkpoint. Called on all ranks; gathers a few kilobytes."""
        section["random_states"] = random_state.gather(self._noted or self._collect(), num_ranks)
        if self._is_over and self._loader_states:
            checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"] = self._loader_states

    def load(self, states: list[dict[str, Any]] | None, num_ranks: int, source: Any) -> None:
        """Take the states of a checkpoint, if there is one for each rank, to restore them when the run begins."""
        self._loaded, self._saved = random_state.fitting_states(states, num_ranks, source), states

    def before_iterator(self, dataloader: Any, epoch: int) -> None:
        """Restore what making the training data's iterator draws from, and the sampler's epoch."""
        if self._loaded is None:
            return
        own = self._strategy.random_state_of_this_rank(self._loaded)
        random_state.restore(own)
        if self._loaders is None:
            self._loaders = list(own.get("loaders", []))
        if self._loaders:
            random_state.restore_loader(dataloader, self._loaders.pop(0))
        # Lightning tells samplers the epoch only after a resumed run has made its iterator
        set_epoch(dataloader, epoch)

    def begin(self, trainer: "pl.Trainer") -> None:
        """Begin the run: go on where the checkpoint was written, and forget what was loaded. At ``on_train_start``."""
        inside_epoch = _say_what_repeats(trainer)
        if self._loaded is not None and inside_epoch:
            # making the loader's iterator drew from the generators
            random_state.restore(self._strategy.random_state_of_this_rank(self._loaded))
        elif self._loaded is not None:
            self._at_first_epoch = random_state.collect()
        own = None if self._loaded is None else self._strategy.random_state_of_this_rank(self._loaded)
        random_state.restore_dropout(self._saved, own, self._strategy.lightning_module)
        self._loaded = self._saved = self._loaders = self._noted = self._loader_states = None
        self._is_over = False
        _begin_after_last_batch(trainer.fit_loop)

    def begin_epoch(self) -> None:
        """Undo what hooks of ``on_train_start`` drew: a run that never stopped had none at this epoch."""
        if self._at_first_epoch is not None:
            random_state.restore(self._at_first_epoch)
            self._at_first_epoch = None

    def _collect(self) -> dict[str, Any]:
        combined = self._train_loader
        loaders = [] if combined is None else combined.flattened
        states = random_state.collect(self._strategy.lightning_module)
        return {**states, "loaders": random_state.collect_loaders(loaders)}


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


def _begin_after_last_batch(fit_loop: Any) -> None:
    """Let a run that was resumed behind an epoch's last batch begin the next one."""
    batch_loop = fit_loop.epoch_loop
    if (
        fit_loop.restarted_mid_epoch
        and batch_loop.restarted_on_train_batch_end
        and batch_loop.batch_progress.is_last_batch
    ):
        fit_loop.reset_restart_stage()


def _say_what_repeats(trainer: "pl.Trainer") -> bool:
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
