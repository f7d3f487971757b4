"""DDP on 2 and 4 gloo ranks against one process: gradients, steps, files, replicas."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from lightning_lora import adapter_state_dict
from tests.distributed.ddp_script import train
from tests.distributed.launch import launch

# lr 1e-2 / eps 1e-4 turns a rounding of 1e-8 in a gradient into 1e-6 per step, and there are eight
STEP_TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(scope="module", params=[2, 4])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    directory = tmp_path_factory.mktemp(f"ddp{request.param}")
    _, single = train(directory / "single", "auto", 0, 1, max_epochs=2)
    ranks = launch("ddp_script.py", request.param, directory)
    return {"directory": directory, "single": single, "ranks": ranks}


def test_every_gradient_equals_one_process(run: dict[str, Any]) -> None:
    for name, gradient in run["single"].gradients.items():
        torch.testing.assert_close(run["ranks"][0]["gradients"][name], gradient, rtol=1e-4, atol=1e-7)


def test_eight_optimizer_steps_equal_one_process(run: dict[str, Any]) -> None:
    torch.testing.assert_close(run["ranks"][0]["adapters"], adapter_state_dict(run["single"]), **STEP_TOLERANCE)


def test_replicas_are_bit_equal(run: dict[str, Any]) -> None:
    for rank in run["ranks"][1:]:
        torch.testing.assert_close(rank["adapters"], run["ranks"][0]["adapters"], rtol=0, atol=0)


def test_one_file_holds_the_adapters_alone(run: dict[str, Any]) -> None:
    files = sorted(path.name for path in (run["directory"] / "ddp").iterdir())
    assert files == ["epoch=0.ckpt", "epoch=1.ckpt"]
    saved = torch.load(run["directory"] / "ddp" / "epoch=1.ckpt", weights_only=True)
    theirs = {name.removeprefix("model."): value for name, value in saved["state_dict"].items()}
    torch.testing.assert_close(theirs, run["ranks"][0]["adapters"], rtol=0, atol=0)
    assert len(saved["lightning_lora"]["random_states"]) == len(run["ranks"])


def test_resume_on_the_same_ranks_is_bit_exact(run: dict[str, Any]) -> None:
    for rank in run["ranks"]:
        assert rank["resumed_losses"] == rank["losses"][4:]
        torch.testing.assert_close(rank["resumed"], rank["adapters"], rtol=0, atol=0)


def test_resume_with_dropout_is_bit_exact_on_every_rank(run: dict[str, Any]) -> None:
    for rank in run["ranks"]:
        assert rank["dropout_resumed_losses"] == rank["dropout_losses"][4:]


def test_a_file_of_one_process_resumes_on_many(run: dict[str, Any]) -> None:
    torch.testing.assert_close(run["ranks"][0]["from_one"], adapter_state_dict(run["single"]), **STEP_TOLERANCE)


def test_a_file_of_many_resumes_on_one_process(run: dict[str, Any], tmp_path: Path) -> None:
    _, module = train(tmp_path, "auto", 0, 1, max_epochs=2, ckpt_path=run["directory"] / "ddp" / "epoch=0.ckpt")
    torch.testing.assert_close(adapter_state_dict(module), adapter_state_dict(run["single"]), **STEP_TOLERANCE)
    assert isinstance(module.trainer.strategy, pl.strategies.SingleDeviceStrategy)


def test_a_step_reduces_all_gradients_at_once(run: dict[str, Any]) -> None:
    adapters = adapter_state_dict(run["single"]).values()
    # and a flag for each tensor, whether it is there
    assert run["ranks"][0]["all_reduces"] == [len(adapters) + sum(value.numel() for value in adapters)] * 8


def test_accumulation_steps_once_for_two_batches(run: dict[str, Any]) -> None:
    assert run["ranks"][0]["steps"] == 2


def test_fabric_resumes_exactly(run: dict[str, Any]) -> None:
    for rank in run["ranks"]:
        assert rank["fabric_resumed"] == rank["fabric_going_on"]
