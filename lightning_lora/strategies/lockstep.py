"""The ranks of a Trainer's run begin every batch and leave every epoch together; they stop together on a signal.

Before a batch, and after the last, all ranks compare where they are: one all-reduce of three integers, instead of the
broadcast of one that Lightning makes before every batch. Where ranks are apart (one has no more batches, or was told to
stop), all of them raise one error that says which rank is where. Otherwise they would wait for each other, or average
the gradients of different batches.
"""

from typing import Any

import lightning.pytorch as pl
import torch

from lightning_lora.strategies.signals import NotedSignals, Request

_REMEDY = (
    "Give every rank the same number of batches (a DistributedSampler does), limit them alike, and set "
    "trainer.should_stop on all ranks: trainer.strategy.reduce_boolean_decision(...) makes one decision of theirs"
)


def keep_in_step(trainer: "pl.Trainer") -> None:
    """Let the ranks go through a Trainer's batches together. Called at ``setup``; twice is once."""
    if not isinstance(trainer._signal_connector, NotedSignals):
        trainer._signal_connector = NotedSignals(trainer)
        Lockstep(trainer)


class Lockstep:
    """Stands around the places of a Trainer's loops where a batch begins, and where an epoch ends."""

    def __init__(self, trainer: "pl.Trainer") -> None:
        self._trainer = trainer
        loop, epoch_loop = trainer.fit_loop, trainer.fit_loop.epoch_loop
        self._advance, self._run, self._end_epoch = epoch_loop.advance, epoch_loop.run, loop.on_advance_end
        epoch_loop.advance, epoch_loop.run = self.advance, self.run  # type: ignore[method-assign]
        loop.on_advance_end = self.end_epoch  # type: ignore[method-assign]
        epoch_loop._broadcast_sigterm_tensor = _nothing  # type: ignore[method-assign]

    def advance(self, data_fetcher: Any) -> None:
        """Run one batch, or stop before it."""
        epoch_loop = self._trainer.fit_loop.epoch_loop
        self._meet(leaves=False)
        # at an epoch's start, and in an accumulation, there is nothing that a run could go on from exactly
        between_steps = epoch_loop.batch_progress.current.ready > 0 and not epoch_loop._should_accumulate()
        if self._signals.agreed and between_steps and not epoch_loop.restarting:
            if epoch_loop._should_check_val_fx(data_fetcher):
                epoch_loop._batches_that_stepped -= 1  # a resumed run passes the end of this batch again, and counts it
            self._signals.stop()
        self._advance(data_fetcher)

    def run(self, data_fetcher: Any) -> None:
        """Run the batches of one epoch."""
        self._run(data_fetcher)
        self._meet(leaves=True)

    def end_epoch(self) -> None:
        """Run the hooks of an epoch's end, and stop there if more epochs were to come."""
        self._end_epoch()
        loop = self._trainer.fit_loop
        if self._signals.agreed and not loop.done:
            # Lightning resumes from an epoch's end only as callbacks see it, which is before it counts as completed
            for counts in (loop.epoch_progress.current, loop.epoch_progress.total):
                counts.completed -= 1
            self._signals.stop()

    @property
    def _signals(self) -> NotedSignals:
        signals = self._trainer._signal_connector
        assert isinstance(signals, NotedSignals)
        return signals

    def _meet(self, *, leaves: bool) -> None:
        """Compare with the other ranks what this one does next, and take over what they were asked for.

        Called on all ranks; one all-reduce of three integers over all of them.
        """
        signals, trainer = self._signals, self._trainer
        if trainer.world_size == 1:
            signals.agreed = signals.noted
            return
        batches = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        place = (trainer.current_epoch << 32) + 2 * batches + leaves
        numbers = torch.tensor([signals.noted, place, -place], device=trainer.strategy.root_device)
        torch.distributed.all_reduce(numbers, torch.distributed.ReduceOp.MAX)
        agreed, last, first = numbers.tolist()
        if last != -first:
            self._say_where_all_are(self._where(leaves=leaves))
        signals.agreed = Request(agreed)

    def _where(self, *, leaves: bool) -> str:
        trainer, progress = self._trainer, self._trainer.fit_loop.epoch_loop.batch_progress.current
        if not leaves:
            return f"begins batch {progress.ready} of epoch {trainer.current_epoch}"
        reason = "trainer.should_stop is set on it" if trainer.should_stop else "it has no more"
        return f"left epoch {trainer.current_epoch} after {progress.ready} batches, since {reason}"

    def _say_where_all_are(self, where: str) -> None:
        places: list[Any] = [None] * self._trainer.world_size
        torch.distributed.all_gather_object(places, where)
        ranks: dict[str, list[str]] = {}
        for rank, place in enumerate(places):
            ranks.setdefault(place, []).append(str(rank))
        said = "; ".join(
            f"rank{'s' if len(some) > 1 else ''} {', '.join(some)} {place}" for place, some in ranks.items()
        )
        raise RuntimeError(f"the ranks are at different batches: {said}. {_REMEDY}")


def _nothing() -> None:
    """Stand for Lightning's broadcast of rank 0's SIGTERM."""
