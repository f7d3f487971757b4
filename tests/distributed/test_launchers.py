"""The same script started by plain python, by torchrun and by SLURM's variables; and a rank that is killed."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.distributed.launch import free_port, run, torchrun_variables
from tests.distributed.launched_script import EPOCHS, KILLED_AT

SCRIPT = "launched_script.py"
BOTH = ",".join(EPOCHS)


def adapters(directory: Path, strategy: str = "fsdp_lora") -> list[dict[str, Tensor]]:
    """Return the adapters that each rank ended with."""
    return [torch.load(directory / strategy / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


def losses(directory: Path, strategy: str, rank: int) -> dict[int, float]:
    """Return the loss of every step, as it was computed last."""
    lines = (directory / strategy / f"losses{rank}.txt").read_text().splitlines()
    return {int(step): float(value) for step, value in (line.split() for line in lines)}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("undisturbed")
    run(SCRIPT, torchrun_variables(2), directory, str(directory), BOTH)
    return directory


def test_plain_python_starts_the_other_process(undisturbed: Path, tmp_path: Path) -> None:
    [output] = run(SCRIPT, [{}], tmp_path, str(tmp_path), "fsdp_lora")
    assert "Starting with 2 processes" in output
    torch.testing.assert_close(adapters(tmp_path), adapters(undisturbed), rtol=0, atol=0)


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
    ranks = [{"SLURM_PROCID": rank, "SLURM_LOCALID": rank, **common} for rank in ("0", "1")]
    run(SCRIPT, ranks, tmp_path, str(tmp_path), "fsdp_lora")
    torch.testing.assert_close(adapters(tmp_path), adapters(undisturbed), rtol=0, atol=0)


def test_workers_of_another_launcher_have_one_device_each(undisturbed: Path, tmp_path: Path) -> None:
    common = {"WORKERS": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [{"WORKER": rank, **common} for rank in ("0", "1")]
    run(SCRIPT, ranks, tmp_path, str(tmp_path), "fsdp_lora")
    torch.testing.assert_close(adapters(tmp_path), adapters(undisturbed), rtol=0, atol=0)


@pytest.fixture(scope="module")
def disturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with each strategy, one after the other, by torchrun's agent: a rank of each is killed once."""
    directory = tmp_path_factory.mktemp("disturbed")
    run("elastic_script.py", [{}], directory, str(directory), BOTH)
    return directory


@pytest.mark.parametrize("strategy", EPOCHS)
def test_a_killed_rank_is_started_again_and_the_run_ends_as_if_undisturbed(
    undisturbed: Path, disturbed: Path, strategy: str
) -> None:
    assert (disturbed / strategy / "killed").exists()
    for rank in range(2):
        assert losses(disturbed, strategy, rank) == losses(undisturbed, strategy, rank)
        assert len(losses(disturbed, strategy, rank)) == 16 > KILLED_AT
    torch.testing.assert_close(adapters(disturbed, strategy), adapters(undisturbed, strategy), rtol=0, atol=0)
    assert not [path.name for path in (disturbed / strategy).iterdir() if path.name.endswith(".part")]


def test_ranks_that_share_a_model_have_the_same_losses(undisturbed: Path) -> None:
    one, other = (losses(undisturbed, "megatron_lora", rank) for rank in range(2))
    assert one == other
