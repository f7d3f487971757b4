"""Save and restore where a Trainer's run stands: random generators and dataloaders."""

from typing import Any

from torch import Tensor

from lightning_lora.checkpoint import random_state
from lightning_lora.compat.lightning import loader_states, set_epoch, train_loader
from lightning_lora.strategies.trainer.progress import say_what_repeats


class RunPosition:
    """What a checkpoint keeps of a run beside tensors and counts, so that a resumed run draws the same numbers.

    Args:
        strategy: of the run; it says which of the saved states is this rank's.
    """

    def __init__(self, strategy: Any) -> None:
        self._strategy = strategy
        self._loaded: list[dict[str, Any]] | None = None  # states of all ranks, until the resumed run is under way
        self._loaders: list[list[Tensor]] | None = None  # of this rank, still to be restored
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
        self._loaded = random_state.fitting_states(states, num_ranks, source)

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

    def begin(self, trainer: Any) -> None:
        """Begin the run: go on where the checkpoint was written, and forget what was loaded. At ``on_train_start``."""
        inside_epoch = say_what_repeats(trainer)
        if self._loaded is not None and inside_epoch:
            # making the loader's iterator drew from the generators
            random_state.restore(self._strategy.random_state_of_this_rank(self._loaded))
        elif self._loaded is not None:
            self._at_first_epoch = random_state.collect()
        self._loaded = self._loaders = self._noted = self._loader_states = None
        self._is_over = False

    def begin_epoch(self) -> None:
        """Undo what hooks of ``on_train_start`` drew: a run that never stopped had none at this epoch."""
        if self._at_first_epoch is not None:
            random_state.restore(self._at_first_epoch)
            self._at_first_epoch = None

    def _collect(self) -> dict[str, Any]:
        combined = self._train_loader
        loaders = [] if combined is None else combined.flattened
        return {**random_state.collect(), "loaders": random_state.collect_loaders(loaders)}
