"""Files that are whole or not there."""

import contextlib
import hashlib
import os
from pathlib import Path

import torch


def write_atomically(path: Path, content: bytes | memoryview) -> None:
    """Write ``content`` to ``path`` so that at any moment the former or the new file is there in full.

    The bytes go to a hidden file in the same directory, are flushed to the disk, and replace the former file in one
    step. Every rank has a hidden file of its own, so that all may write to one path.

    Raises:
        OSError: it could not be written (disk full, no permission). The former file is untouched.
    """
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    rank = torch.distributed.get_rank() if distributed else 0
    temporary = path.with_name(f".{hashlib.blake2b(path.name.encode(), digest_size=8).hexdigest()}.{rank}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise OSError(
            error.errno,
            f"cannot write {len(content):,} bytes to {path}: {error.strerror}; a former file of that name is untouched",
        ) from error
