"""A file is written whole or not at all: by a process that is killed, that the system stops, that is not the only one."""

import errno
import io
import os
import resource
import signal
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_lora.checkpoint.atomic_io import AtomicCheckpointIO, write_atomically
from tests.distributed.ranks import on_ranks


def written_at(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0


def write_without_end(path: Path) -> None:
    n = 0
    while True:
        AtomicCheckpointIO().save_checkpoint({"n": n, "x": torch.full((500_000,), n)}, path)
        n += 1


@on_ranks(1)
def test_killed_at_any_moment_the_former_file_is_readable(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    for delay_s in (0.01, 0.037, 0.08):
        former = written_at(path)
        child = os.fork()
        if child == 0:
            write_without_end(path)
        while written_at(path) == former:
            assert os.waitpid(child, os.WNOHANG) == (0, 0)
            time.sleep(0.001)
        time.sleep(delay_s)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        saved = torch.load(path, weights_only=True)
        assert torch.equal(saved["x"], torch.full((500_000,), saved["n"]))
    assert "last.ckpt" in [path.name for path in tmp_path.iterdir()]


def test_a_full_disk_leaves_the_former_file_and_no_litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "last.ckpt"
    write_atomically(path, b"former")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"cannot write 3 bytes to .*last.ckpt: No space left on device; a former file"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"former"
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


@on_ranks(2)
def test_ranks_write_to_one_path_at_the_same_time(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo")
    for _ in range(200):
        write_atomically(tmp_path / "adapter" / "x", b"x" * 5000)
    torch.distributed.barrier()
    assert [p.name for p in (tmp_path / "adapter").iterdir()] == ["x"]


@on_ranks(1)
def cut_short(path: Path) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    with pytest.raises(OSError, match="cannot write 5,000 bytes to"):
        write_atomically(path, b"x" * 5000)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def test_a_write_that_the_system_cuts_short_leaves_the_former_file(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    write_atomically(path, b"former")
    cut_short(path)
    assert path.read_bytes() == b"former"
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_checkpoint_is_written_without_a_copy_of_it_in_memory(tmp_path: Path) -> None:
    content = {"x": torch.zeros(2**24), "n": 1}
    torch.save(content, tmp_path / "archive.ckpt")  # the file's name is in its bytes
    tracemalloc.start()
    AtomicCheckpointIO().save_checkpoint(content, tmp_path / "atomic.ckpt")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**20
    assert (tmp_path / "atomic.ckpt").read_bytes() == (tmp_path / "archive.ckpt").read_bytes()


def test_a_full_disk_amid_a_checkpoint_leaves_the_former_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"n": 1}, path)
    real = Path.open

    class Full(io.FileIO):
        def write(self, content: Any) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(
        Path, "open", lambda self, mode="r": Full(self, "w") if self.suffix == ".part" else real(self, mode)
    )
    with pytest.raises(OSError, match=r"bytes to .*last.ckpt: No space left on device; a former file"):
        AtomicCheckpointIO().save_checkpoint({"n": 2, "x": torch.zeros(1000)}, path)
    assert torch.load(path, weights_only=True) == {"n": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]
