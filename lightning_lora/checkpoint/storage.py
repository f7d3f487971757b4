"""Find, read and remove files on local disks and behind URLs.

URLs (``s3://``, ``gs://``, ``hf://``, ``memory://``) are read and written through fsspec, as in Lightning.
"""

import contextlib
import os
import tempfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

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
        return self.url.rstrip("/").rpartition("/")[2]

    @property
    def parent(self) -> "RemotePath":
        return RemotePath(self.url.rstrip("/").rpartition("/")[0])

    def is_file(self) -> bool:
        fs, path = self._opened()
        return bool(fs.isfile(path))

    def is_dir(self) -> bool:
        """Whether there is a directory; where a store knows none, whether any file lies below."""
        fs, path = self._opened()
        return bool(fs.isdir(path))

    def iterdir(self) -> Iterator["RemotePath"]:
        fs, path = self._opened()
        for child in fs.ls(path, detail=False):
            yield self / child.rstrip("/").rpartition("/")[2]

    def read_bytes(self) -> bytes:
        fs, path = self._opened()
        content: bytes = fs.cat_file(path)
        return content

    def read_text(self) -> str:
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
