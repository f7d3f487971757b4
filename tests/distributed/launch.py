"""Start a script on several gloo ranks as torchrun does, and collect what each rank found."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent.parent


def launch(script: str, num_ranks: int, directory: Path, *arguments: str, timeout_s: int = 240) -> list[Any]:
    """Run ``tests/distributed/<script>`` on ``num_ranks`` processes; return what each one saved with :func:`report`."""
    port = free_port()
    processes = []
    for rank in range(num_ranks):
        environment = {
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
        command = [sys.executable, str(Path(__file__).parent / script), str(directory), *arguments]
        processes.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    outputs = []
    try:
        outputs = [process.communicate(timeout=timeout_s)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    failed = [rank for rank, process in enumerate(processes) if process.returncode != 0]
    assert not failed, f"ranks {failed} failed:\n{outputs[failed[0]][-4000:]}"
    return [torch.load(directory / f"rank{rank}.pt", weights_only=True) for rank in range(num_ranks)]


def free_port() -> int:
    """Return a port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def report(directory: Path, values: Any) -> None:
    """Save this rank's findings for the test that launched it."""
    torch.save(values, directory / f"rank{os.environ['RANK']}.pt")
