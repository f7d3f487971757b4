"""Write a checkpoint file beside its place and move it there, so that a file is whole or absent."""

import functools
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from typing_extensions import override

from lightning_lora.checkpoint.storage import write_atomically


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's file writer, made safe against a crash, a kill and a full disk on local file systems.

    ``torch.save`` writes into the file, so that no second copy of the checkpoint is made in memory. Remote paths are
    written as Lightning does.
    """

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        write_atomically(Path(path), functools.partial(torch.save, checkpoint))


def make_atomic(checkpoint_io: CheckpointIO) -> None:
    """Make a strategy's ``CheckpointIO`` write atomically, also under wrappers such as ``AsyncCheckpointIO``.

    A writer of the user's own is left alone.
    """
    while (inner := getattr(checkpoint_io, "checkpoint_io", None)) is not None:
        checkpoint_io = inner
    if type(checkpoint_io) is TorchCheckpointIO:
        checkpoint_io.__class__ = AtomicCheckpointIO
