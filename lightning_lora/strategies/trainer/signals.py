"""Act on a scheduler's signal on all ranks together, between two batches.

Lightning's own handlers talk to the other ranks, or write a checkpoint, wherever the signal finds them: in a
collective, an optimizer's step, another checkpoint. The other ranks are elsewhere, and all wait for each other until
the process group's timeout.

A fit that is signalled on any rank ends on all of them after the same batch:

- in a batch, or before the first one: when the optimizer step that the batch belongs to is done;
- in a validation or while a checkpoint is written: when that is done, if no gradients are accumulated then;
- after the last batch of the run: not at all, since the run ends by itself.

A second signal changes nothing, but that SLURM's request to requeue comes before SIGTERM. A resumed run goes on exactly
from the file that was written.
"""

import logging
from enum import IntEnum
from typing import Any

from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_prefixed_message
from typing_extensions import override

from lightning_lora.compat.lightning import requeue, signal_connector_class

log = logging.getLogger("lightning.pytorch.trainer.connectors.signal_connector")  # it has a handler of Lightning's


class Request(IntEnum):
    """What a signal asks for; of several signals the highest counts."""

    NOTHING = 0
    STOP = 1  # SIGTERM
    REQUEUE = 2  # SLURM's signal ahead of the time limit


class NotedSignals(signal_connector_class()):  # type: ignore[misc]  # looked up when a run first needs it
    """Lightning's signal handlers, which only note a signal here; the ranks act on it later, together.

    ``received_sigterm``, which Lightning and users read, is true when all ranks have agreed to stop.

    Attributes:
        noted: what this process was asked for.
        agreed: what all ranks know that one of them was asked for.
    """

    noted = Request.NOTHING
    agreed = Request.NOTHING

    @override
    def register_signal_handlers(self) -> None:
        self.noted = self.agreed = Request.NOTHING
        super().register_signal_handlers()

    @override
    def _sigterm_notifier_fn(self, signum: Any, _: Any) -> None:
        log.info(rank_prefixed_message(f"Received SIGTERM: {signum}", self.trainer.local_rank))
        launcher = self.trainer.strategy.launcher
        if self.noted == Request.NOTHING and launcher is not None:
            launcher.kill(signum)
        self.noted = max(self.noted, Request.STOP)
        if self.trainer.state.fn != TrainerFn.FITTING:
            self.received_sigterm = True  # an evaluation has nothing to save, and ends after the batch

    @override
    def _slurm_sigusr_handler_fn(self, signum: Any, _: Any) -> None:
        self.noted = Request.REQUEUE

    def stop(self) -> None:
        """Save for SLURM and requeue the job if that was asked for, and end the run. Called on all ranks.

        Raises:
            SIGTERMException: always; ``OnExceptionCheckpoint`` saves on it.
        """
        if self.agreed == Request.REQUEUE:
            requeue(self, self.agreed)
        self.received_sigterm = True
        raise SIGTERMException
