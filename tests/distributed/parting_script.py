"""One rank of runs in which one rank does something that the other does not; it says what it was told of it."""

import fcntl
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, OnExceptionCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_lora import LoRACallback
from lightning_lora.distributed import notes
from tests import models, runs
from tests.distributed.launch import report
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


def fit(directory: Path, strategy: str, case: str) -> dict[str, Any]:
    rank = int(os.environ["RANK"])
    batches = 2 if case == "loader" and rank == 1 else 3
    # ranks that share a model see the same batches
    seed = 1 if strategy == "megatron_lora" else 1 + rank
    loader = DataLoader(models.token_ids(2 * batches, 8, seed=seed), batch_size=2)
    path = directory / case / "on_exception.ckpt"
    trainer = runs.trainer(
        directory,
        LoRACallback(r=4),
        OddCallback(),
        OnExceptionCheckpoint(path.parent),
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
    return {
        "error": type(raised).__name__,
        "message": str(raised),
        "warned": any("was not written" in str(one.message) for one in said),
        "step": trainer.global_step,
    }


def main(directory: Path, strategy: str, *cases: str) -> None:
    """Run the cases in turn; after one in which ranks part there can be no other.

    The word ``"stays"`` behind it lets rank 1, which failed, live on until rank 0 has ended.
    """
    notes.PATIENCE_S = 1.0
    if "stays" in cases:
        notes.END_S = 1.0
    with (directory / "lock").open("w") as lock:
        if os.environ["RANK"] == "0":
            fcntl.flock(lock, fcntl.LOCK_EX)  # the system lets go of it when the process ends
        found = {case: fit(directory, strategy, case) for case in cases if case != "stays"}
        report(directory, found)
        if "stays" in cases:
            fcntl.flock(lock, fcntl.LOCK_EX)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
