"""Start a script on several gloo ranks as torchrun does, and collect what each rank found."""

import contextlib
import functools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent.parent


def launch(
    script: str, num_ranks: int, directory: Path, *arguments: str, timeout_s: int = 1800, fresh: bool = False
) -> list[Any]:
    """Run ``tests/distributed/<script>`` on ``num_ranks`` processes; return what each one saved with :func:`report`.

    Args:
        fresh: the ranks share no memory with a process that was there before.
    """
    port = free_port()
    environments = [
        {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "GROUP_RANK": "0",
            "WORLD_SIZE": str(num_ranks),
            "LOCAL_WORLD_SIZE": str(num_ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "TORCHELASTIC_RUN_ID": "test",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        }
        for rank in range(num_ranks)
    ]
    outputs = [directory / f"output{rank}.txt" for rank in range(num_ranks)]
    order = {
        "script": str(Path(__file__).parent / script),
        "arguments": [str(directory), *arguments],
        "environments": environments,
        "outputs": list(map(str, outputs)),
        "fresh": fresh,
    }
    codes = _obeyed(order, timeout_s)
    # a rank that died of itself first: the others may only have been killed with it
    failed = sorted((rank for rank, code in enumerate(codes) if code != 0), key=lambda rank: codes[rank] < 0)
    assert not failed, f"ranks {failed} failed with {codes}:\n{outputs[failed[0]].read_text()[-4000:]}"
    return [torch.load(directory / f"rank{rank}.pt", weights_only=True) for rank in range(num_ranks)]


def _obeyed(order: dict[str, Any], timeout_s: int) -> list[int]:
    """Give the zygote an order and return the exit codes; ranks that take too long are killed."""
    zygote = _zygote()
    assert zygote.stdin is not None
    assert zygote.stdout is not None
    zygote.stdin.write(json.dumps(order) + "\n")
    zygote.stdin.flush()
    children = json.loads(zygote.stdout.readline())
    timer = threading.Timer(timeout_s, _kill, [children])
    timer.start()
    try:
        codes: list[int] = json.loads(zygote.stdout.readline())
    except BaseException:  # pytest's own time limit
        _kill(children)
        _zygote.cache_clear()
        raise
    finally:
        timer.cancel()
    return codes


@functools.cache
def _zygote() -> "subprocess.Popen[str]":
    """Return the process that ranks are forked from; it ends with this one, whose end closes its input."""
    return subprocess.Popen(
        [sys.executable, str(Path(__file__).parent / "zygote.py")],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def _kill(processes: list[int]) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def free_port() -> int:
    """Return a port of this machine that nothing listens on.

    Systems hand out ports above these to whoever asks for any, other tests' ranks among them, before it is used.
    """
    while True:
        port = random.SystemRandom().randrange(15_000, 30_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def report(directory: Path, values: Any) -> None:
    """Save this rank's findings for the test that launched it."""
    torch.save(values, directory / f"rank{os.environ['RANK']}.pt")
