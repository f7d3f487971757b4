"""The same script started by plain python, by torchrun and by SLURM's variables; and a rank that is killed."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.launch import ROOT, free_port
from tests.distributed.launched_script import KILLED_AT

SCRIPT = str(Path(__file__).parent / "launched_script.py")
QUIET = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
DISTRIBUTED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID")


def environment(**more: str) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if key not in DISTRIBUTED and "SLURM" not in key}
    return {**kept, **QUIET, **more}


def finished(process: "subprocess.Popen[str]") -> str:
    output, _ = process.communicate(timeout=1800)
    assert process.returncode == 0, output[-4000:]
    return output


def all_finished(processes: "list[subprocess.Popen[str]]") -> None:
    """Wait for all ranks, rank 0 last: it would wait in vain for one that died."""
    try:
        for process in reversed(processes):
            finished(process)
    finally:
        for process in processes:
            process.kill()


def start(command: list[str], **more: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        command, env=environment(**more), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def torchrun(directory: Path, *arguments: str) -> list[str]:
    rendezvous = ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "--max-restarts=1"]
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        *rendezvous,
        SCRIPT,
        str(directory),
        *arguments,
    ]


def results(directory: Path) -> list[dict[str, Any]]:
    return [torch.load(directory / f"rank{rank}.pt", weights_only=True)["adapters"] for rank in range(2)]


def losses(directory: Path, rank: int) -> dict[int, float]:
    """Return the loss of every step, as it was computed last."""
    lines = (directory / f"losses{rank}.txt").read_text().splitlines()
    return {int(step): float(value) for step, value in (line.split() for line in lines)}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("torchrun")
    finished(start(torchrun(directory)))
    return directory


def test_plain_python_starts_the_other_process(undisturbed: Path, tmp_path: Path) -> None:
    output = finished(start([sys.executable, SCRIPT, str(tmp_path)]))
    assert "Starting with 2 processes" in output
    torch.testing.assert_close(results(tmp_path), results(undisturbed), rtol=0, atol=0)


def test_slurm_starts_both(undisturbed: Path, tmp_path: Path) -> None:
    common = {
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NAME": "train",
        "SLURM_NODELIST": "localhost",
        "SLURM_NODEID": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    processes = [
        start([sys.executable, SCRIPT, str(tmp_path)], SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank), **common)
        for rank in range(2)
    ]
    all_finished(processes)
    torch.testing.assert_close(results(tmp_path), results(undisturbed), rtol=0, atol=0)


def test_workers_of_another_launcher_have_one_device_each(undisturbed: Path, tmp_path: Path) -> None:
    common = {"WORKERS": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = [
        start([sys.executable, SCRIPT, str(tmp_path), "worker"], WORKER=str(rank), **common) for rank in (0, 1)
    ]
    all_finished(processes)
    torch.testing.assert_close(results(tmp_path), results(undisturbed), rtol=0, atol=0)


def test_a_killed_rank_is_started_again_and_the_run_ends_as_if_undisturbed(undisturbed: Path, tmp_path: Path) -> None:
    finished(start(torchrun(tmp_path, "dies")))
    assert (tmp_path / "killed").exists()
    for rank in range(2):
        assert losses(tmp_path, rank) == losses(undisturbed, rank)
        assert len(losses(tmp_path, rank)) == 16 > KILLED_AT
    torch.testing.assert_close(results(tmp_path), results(undisturbed), rtol=0, atol=0)
    assert not [path.name for path in tmp_path.iterdir() if path.name.endswith(".part")]


def test_a_killed_rank_of_a_split_model_is_started_again_too(tmp_path: Path) -> None:
    whole, disturbed = tmp_path / "whole", tmp_path / "disturbed"
    for directory, words in ((whole, ["splits"]), (disturbed, ["splits", "dies"])):
        directory.mkdir()
        finished(start(torchrun(directory, *words)))
    assert (disturbed / "killed").exists()
    for rank in range(2):
        assert losses(disturbed, rank) == losses(whole, rank) == losses(whole, 0)
        assert len(losses(disturbed, rank)) == 16 > KILLED_AT
    torch.testing.assert_close(results(disturbed), results(whole), rtol=0, atol=0)
