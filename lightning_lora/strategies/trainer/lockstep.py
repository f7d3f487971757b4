"""Keep the ranks of a Trainer's run together: they begin batches, leave epochs, stop and fail together.

Before a batch, before a validation and after the last batch, all ranks compare where they are: one all-reduce of three
integers, instead of the broadcast of one that Lightning makes before every batch. Where ranks are apart (one has no
more batches, or was told to stop), all of them raise one error that says which rank is where. Otherwise they would wait
for each other, or average the gradients of different batches.
"""

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import RunningStage, TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_lora.compat.lightning import (
    accumulates,
    dump_checkpoint,
    has_no_more_batches,
    set_signal_connector,
    silence_sigterm_broadcast,
    uncount_batch,
    validates_next,
)
from lightning_lora.distributed.notes import Notes, common_notes

_BEGINS, _VALIDATES, _LEAVES = range(3)
_OF_ALL_RANKS = ("barrier", "broadcast", "reduce", "_num_ranks")  # methods of a strategy
_REMEDY = (
    "Give every rank the same number of batches (a DistributedSampler does), limit them alike, and set "
    "trainer.should_stop on all ranks: trainer.strategy.reduce_boolean_decision(...) makes one decision of theirs"
)


class Lockstep:
    """Wraps the methods of a Trainer's loops in which all ranks meet, for one run. Made on all ranks."""

    def __init__(self, trainer: "pl.Trainer") -> None:
        from lightning_lora.strategies.trainer.signals import NotedSignals  # its base class is looked up by this import

        self._trainer = trainer
        self._signals = NotedSignals(trainer)
        set_signal_connector(trainer, self._signals)
        loop, epoch_loop, val_loop = trainer.fit_loop, trainer.fit_loop.epoch_loop, trainer.fit_loop.epoch_loop.val_loop
        wrapped: list[tuple[Any, str]] = [
            (loop, "on_advance_end"),
            (epoch_loop, "advance"),
            (epoch_loop, "run"),
            (val_loop, "run"),
        ]
        replaced = [(trainer, "save_checkpoint"), *((trainer.strategy, name) for name in _OF_ALL_RANKS)]
        for owner, name in (*wrapped, *replaced):
            vars(owner).pop(name, None)  # an earlier run's
        self._end_epoch, loop.on_advance_end = loop.on_advance_end, self.end_epoch  # type: ignore[method-assign]
        self._advance, epoch_loop.advance = epoch_loop.advance, self.advance  # type: ignore[method-assign]
        self._run, epoch_loop.run = epoch_loop.run, self.run  # type: ignore[method-assign]
        self._validate, val_loop.run = val_loop.run, self.validate  # type: ignore[method-assign]
        silence_sigterm_broadcast(epoch_loop)
        self._notes: Notes | None = common_notes(trainer.strategy)
        self._all_raise = self._has_failed = False

    def advance(self, data_fetcher: Any) -> None:
        """Run one batch, or stop before it."""
        epoch_loop = self._trainer.fit_loop.epoch_loop
        self._meet(_BEGINS)
        # at an epoch's start, and in an accumulation, there is nothing that a run could go on from exactly
        between_steps = epoch_loop.batch_progress.current.ready > 0 and not accumulates(epoch_loop)
        if self._signals.agreed and between_steps and not epoch_loop.restarting:
            if validates_next(epoch_loop, data_fetcher):
                uncount_batch(epoch_loop)  # a resumed run passes the end of this batch again, and counts it
            self._stop()
        self._advance(data_fetcher)

    def run(self, data_fetcher: Any) -> None:
        """Run the batches of one epoch."""
        self._run(data_fetcher)
        self._meet(_LEAVES)

    def validate(self) -> Any:
        """Run the validation of a fit."""
        self._meet(_VALIDATES)
        return self._validate()

    def end_epoch(self) -> None:
        """Run the hooks of an epoch's end, and stop there if more epochs were to come."""
        self._end_epoch()
        loop = self._trainer.fit_loop
        if self._signals.agreed and not loop.done:
            # Lightning resumes from an epoch's end only as callbacks see it, which is before it counts as completed
            for counts in (loop.epoch_progress.current, loop.epoch_progress.total):
                counts.completed -= 1
            self._stop()

    def fail(self, exception: BaseException) -> None:
        """Find out whether all ranks raise; if some do not, make this rank wait for them no longer.

        Called on every rank that raises; a second call does nothing.
        """
        if self._notes is None or self._has_failed or self._all_raise:
            return
        self._has_failed = True
        self._notes.leave(exception, self._where())
        if self._notes.parted:
            self._part()

    def close(self) -> None:
        """Stop watching the other ranks."""
        if self._notes is not None:
            self._notes.close()
            self._notes = None

    def _stop(self) -> None:
        self._all_raise = True
        self._signals.stop()

    def _meet(self, step: int) -> None:
        """Check that all ranks do the same next, and agree on the strongest request that any of them got by a signal.

        Called on all ranks; one all-reduce of three integers over all of them.
        """
        signals, trainer = self._signals, self._trainer
        if self._notes is None:
            signals.agreed = signals.noted
            return
        self._notes.check()
        batches = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        place = (trainer.current_epoch << 32) + 3 * batches + step
        numbers = torch.tensor([signals.noted, place, -place], device=trainer.strategy.root_device)
        torch.distributed.all_reduce(numbers, torch.distributed.ReduceOp.MAX)
        agreed, last, first = numbers.tolist()
        if last != -first:
            self._say_where_all_are(step)
        signals.agreed = type(signals.agreed)(agreed)

    def _say_where_all_are(self, step: int) -> None:
        epoch, epoch_loop = self._trainer.current_epoch, self._trainer.fit_loop.epoch_loop
        batches = epoch_loop.batch_progress.current.ready
        if self._trainer.should_stop:
            reason = " (trainer.should_stop is set on it)"
        else:
            reason = " (it has no more)" if has_no_more_batches(epoch_loop) else ""
        own = {
            _BEGINS: f"begins batch {batches} of epoch {epoch}",
            _VALIDATES: f"validates after {batches} batches of epoch {epoch}{reason}",
            _LEAVES: f"left epoch {epoch} after {batches} batches{reason}",
        }[step]
        places: list[Any] = [None] * self._trainer.world_size
        torch.distributed.all_gather_object(places, own)
        self._all_raise = True
        said = "; ".join(f"rank {rank} {place}" for rank, place in enumerate(places))
        raise RuntimeError(f"the ranks are at different batches: {said}. {_REMEDY}")

    def _where(self) -> str:
        trainer, state = self._trainer, self._trainer.state
        batch = trainer.fit_loop.epoch_loop.batch_progress.current.ready - 1
        if state.fn != TrainerFn.FITTING or state.stage is None or (state.stage == RunningStage.TRAINING and batch < 0):
            return f"in trainer.{(state.fn or TrainerFn.FITTING).value}"
        if state.stage == RunningStage.TRAINING:
            return f"in batch {batch} of epoch {trainer.current_epoch}"
        return f"in the validation of epoch {trainer.current_epoch}"

    def _part(self) -> None:
        """Let callbacks save what this rank can save alone, and replace the collectives in which it would wait."""
        trainer: Any = self._trainer
        trainer.save_checkpoint = self._save_alone
        trainer.strategy.barrier = _nothing
        trainer.strategy.broadcast = trainer.strategy.reduce = _first
        trainer.strategy._num_ranks = _one

    def _save_alone(self, filepath: Any, weights_only: bool | None = None, storage_options: Any | None = None) -> None:
        """Stand in for ``trainer.save_checkpoint`` after ranks have parted."""
        trainer: Any = self._trainer
        if trainer.strategy.shards:
            name = type(trainer.strategy).__name__
            rank_zero_warn(f"{filepath} was not written: under {name} a checkpoint takes all ranks, and some have left")
        elif trainer.is_global_zero:
            checkpoint = dump_checkpoint(trainer, weights_only)
            trainer.strategy.save_checkpoint(checkpoint, filepath, storage_options=storage_options)


def _nothing(*_: Any, **__: Any) -> None:
    """Stand in for a collective."""


def _first(value: Any, *_: Any, **__: Any) -> Any:
    return value


def _one() -> int:
    return 1
