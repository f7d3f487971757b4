"""Write a file beside its place and move it there, so that a file is whole or absent."""

import contextlib
import functools
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from typing_extensions import override

from lightning_lora.checkpoint.storage import Location, RemotePath


class _Counted:
    """A file that is written to, the number of bytes handed to it, and the error of the system that ended the writing.

    torch raises an error of its own where a write of a file object fails.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self.num_bytes = 0
        self.error: OSError | None = None
        self._file = file

    def write(self, content: bytes | memoryview) -> int:
        self.num_bytes += len(content)
        try:
            return self._file.write(content)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self._file.flush()


def write_atomically(path: Location, content: bytes | memoryview | Callable[[Any], object]) -> None:
    """Write ``content`` to ``path`` so that at any moment the former or the new file is there in full.

    The bytes go to a hidden file in the same directory, are flushed to the disk, and replace the former file in one
    step. Every rank has a hidden file of its own, so that all may write to one path. Behind a URL they are handed over
    in one call, which object stores make visible in one step.

    Args:
        content: the bytes, or, for a local path, a function that writes them to the open file it is given.

    Raises:
        OSError: it could not be written (disk full, no permission). The former file is untouched.
    """
    if isinstance(path, RemotePath):
        assert not callable(content)
        path.write_bytes(content)
        return
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    rank = torch.distributed.get_rank() if distributed else 0
    temporary = path.with_name(f".{hashlib.blake2b(path.name.encode(), digest_size=8).hexdigest()}.{rank}.part")
    counted: _Counted | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            counted = _Counted(file)
            if callable(content):
                content(counted)
            else:
                counted.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        cause = (counted and counted.error) or error
        if not isinstance(cause, OSError):
            raise
        written = f"{counted.num_bytes:,} bytes to {path}" if counted else f"to {path}"
        raise OSError(
            cause.errno, f"cannot write {written}: {cause.strerror}; a former file of that name is untouched"
        ) from cause


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
