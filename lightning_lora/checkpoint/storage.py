"""Read and write files, atomically, on local disks and behind URLs.

URLs (``s3://``, ``gs://``, ``hf://``, ``memory://``) are read and written through fsspec, as in Lightning.
"""

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeAlias

import torch
from fsspec.core import url_to_fs


@dataclass(frozen=True)
class RemotePath:
    """A file or directory behind a URL, with as much of :class:`pathlib.Path` as is used here."""

    url: str

    def __fspath__(self) -> str:
        return self.url

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> "RemotePath":
        return RemotePath(f"{self.url.rstrip('/')}/{name}")

    @property
    def name(self) -> str:
        """The last part of the URL."""
        return self.url.rstrip("/").rpartition("/")[2]

    @property
    def parent(self) -> "RemotePath":
        """The directory that it lies in."""
        return RemotePath(self.url.rstrip("/").rpartition("/")[0])

    def is_file(self) -> bool:
        """Whether there is a file."""
        fs, path = self._opened()
        return bool(fs.isfile(path))

    def is_dir(self) -> bool:
        """Whether there is a directory; where a store knows none, whether any file lies below."""
        fs, path = self._opened()
        return bool(fs.isdir(path))

    def iterdir(self) -> Iterator["RemotePath"]:
        """Yield what lies in a directory."""
        fs, path = self._opened()
        for child in fs.ls(path, detail=False):
            yield self / child.rstrip("/").rpartition("/")[2]

    def read_bytes(self) -> bytes:
        """Return a file's content."""
        fs, path = self._opened()
        content: bytes = fs.cat_file(path)
        return content

    def read_text(self) -> str:
        """Return a file's content, decoded."""
        return self.read_bytes().decode()

    def write_bytes(self, content: bytes | memoryview) -> None:
        """Write a file, and the directories that it lies in."""
        fs, path = self._opened()
        fs.makedirs(path.rpartition("/")[0] or "/", exist_ok=True)
        fs.pipe_file(path, bytes(content))

    def _opened(self) -> tuple[Any, str]:
        fs, path = url_to_fs(self.url)
        fs.invalidate_cache()  # other processes write there too
        return fs, path


Location: TypeAlias = Path | RemotePath


def location(path: str | os.PathLike[str]) -> Location:
    """Return a local path as a ``Path``, and a URL as a :class:`RemotePath`."""
    text = os.fspath(path)
    if text.startswith("file://"):
        return Path(text.removeprefix("file://"))
    return RemotePath(text) if "://" in text else Path(text)


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


@contextlib.contextmanager
def local_directory(directory: Location) -> Iterator[Path]:
    """Yield a local directory for code that cannot write to URLs; its files are uploaded at the end of the block."""
    if isinstance(directory, Path):
        yield directory
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)
        for file in sorted(Path(folder).rglob("*")):
            if file.is_file():
                (directory / file.relative_to(folder).as_posix()).write_bytes(file.read_bytes())


def remove_files(directory: Location, names: Collection[str]) -> None:
    """Remove the files of these names in and below a directory, and the folders that are empty then."""
    if isinstance(directory, RemotePath):
        fs, path = directory._opened()
        for file in fs.find(path) if fs.exists(path) else ():
            if file.rpartition("/")[2] in names:
                fs.rm_file(file)
        folders = [path, *fs.find(path, withdirs=True)] if fs.isdir(path) else []
        for folder in sorted(folders, reverse=True):
            if fs.isdir(folder) and not fs.ls(folder):
                fs.rmdir(folder)
        return
    for file in [*directory.rglob("*")]:
        if file.name in names and file.is_file():
            file.unlink()
    for folder in sorted((directory, *directory.rglob("*")), reverse=True):
        if folder.is_dir() and not any(folder.iterdir()):  # files of the user's stay
            folder.rmdir()
