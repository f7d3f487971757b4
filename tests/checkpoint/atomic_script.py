"""A process that writes files and is killed, runs into a limit of the system, or is not the only one."""

import os
import resource
import signal
import sys
import time
from pathlib import Path

import torch

from lightning_lora.checkpoint.atomic_io import AtomicCheckpointIO
from lightning_lora.checkpoint.storage import write_atomically


def be_killed(directory: Path) -> None:
    """Have a child write checkpoints without end, and kill it at several moments; each time read what is there."""
    path = directory / "last.ckpt"
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


def written_at(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0


def write_without_end(path: Path) -> None:
    n = 0
    while True:
        AtomicCheckpointIO().save_checkpoint({"n": n, "x": torch.full((500_000,), n)}, path)
        n += 1


def be_cut_short(directory: Path) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    try:
        write_atomically(directory / "last.ckpt", b"x" * 5000)
    except OSError as error:
        print(error)


def write_with_others(directory: Path) -> None:
    torch.distributed.init_process_group("gloo")
    for _ in range(200):
        write_atomically(directory / "adapter" / "x", b"x" * 5000)
    torch.distributed.barrier()


if __name__ == "__main__":
    {way.__name__: way for way in (be_killed, be_cut_short, write_with_others)}[sys.argv[2]](Path(sys.argv[1]))
