"""Two ranks over a base in 4 bits that ``kill -9`` ends in mid-run, and one process that resumes over 16 bits."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from lightning_lora import FSDPLoRAStrategy
from tests.distributed.launch import ROOT, torchrun_variables
from tests.distributed.quantized import Quantized, train_epochs
from tests.distributed.training import EXACT, SHARDED, STEP_TOLERANCE, Recorded

STEPS, EPOCHS = 4, 3  # of an epoch; of the run
KILLED_AT = 6  # in the second epoch


class Killed(pl.Callback):
    """Kills the second rank between backward and step, while the first waits for it."""

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        if trainer.global_step == KILLED_AT and trainer.global_rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)


class Over16Bits(Recorded):
    def __init__(self) -> None:
        super().__init__()
        self.model = self.model.bfloat16()


def train_until_killed(directory: Path) -> None:
    train_epochs(directory, Quantized("nf4"), FSDPLoRAStrategy(**SHARDED), None, EPOCHS, more_callbacks=(Killed(),))


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder with the files of a run of which one rank was killed, and then the other."""
    directory = tmp_path_factory.mktemp("killed")
    code = f"from pathlib import Path; from {__name__} import *; train_until_killed(Path({str(directory)!r}))"
    ranks = [
        subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", **own})
        for own in torchrun_variables(2)
    ]
    assert ranks[1].wait(timeout=300) == -signal.SIGKILL
    ranks[0].kill()
    assert ranks[0].wait(timeout=300) != 0
    return directory


def test_it_resumes_over_bf16_on_one_process_where_the_last_file_was_written(
    killed: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert [path.name for path in killed.iterdir()] == ["epoch=0.ckpt"]
    written = torch.load(killed / "epoch=0.ckpt", weights_only=True)["state_dict"]
    with caplog.at_level("INFO"):
        resumed = train_epochs(tmp_path / "resumed", Over16Bits(), "auto", killed / "epoch=0.ckpt", EPOCHS)
    lines = [record.getMessage() for record in caplog.records if "trained over" in record.getMessage()]
    assert lines == [f"{killed / 'epoch=0.ckpt'}: trained over nf4, loaded over bfloat16"]
    assert resumed["step"] == STEPS
    before = {f"model.{name}": value for name, value in resumed["before"][0].items()}
    torch.testing.assert_close(before, written, **EXACT)
    assert len(resumed["losses"]) == STEPS * (EPOCHS - 1)

    # one process that nobody killed, and that resumes in the same way
    alone = train_epochs(tmp_path / "alone", Quantized("nf4"), "auto", None, 1)
    path = tmp_path / "alone" / "epoch=0.ckpt"
    expected = train_epochs(tmp_path / "again", Over16Bits(), "auto", path, EPOCHS)
    torch.testing.assert_close(resumed["losses"], expected["losses"], **STEP_TOLERANCE)
    torch.testing.assert_close(resumed["after"], expected["after"], **STEP_TOLERANCE)
    # and the loss goes on from what the first epoch reached
    assert max(resumed["losses"]) < min(alone["losses"])
