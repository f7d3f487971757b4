"""What a file must bring back on 2 gloo ranks beside adapters: a teacher that moved, the random state of a loop."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.launch import launch
from tests.distributed.resume_script import MOVES, Follower, Loop, fit_follower


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    directory = tmp_path_factory.mktemp("resume")
    return {"directory": directory, "ranks": launch("resume_script.py", 2, directory)}


@pytest.mark.parametrize("strategy", ["ddp", "fsdp_lora"])
def test_a_teacher_that_moved_by_a_millionth_is_in_every_later_file(
    run: dict[str, Any], strategy: str, tmp_path: Path
) -> None:
    moved = MOVES.removeprefix("teacher.")
    expected = dict(Follower().teacher.named_parameters())
    expected[moved].mul_(1 + 1e-6)
    for name in (strategy, f"{strategy}2"):
        saved = torch.load(run["directory"] / name / "last.ckpt", weights_only=True)["state_dict"]
        assert [key for key in saved if key.startswith("teacher.")] == [MOVES]
    for rank in run["ranks"]:
        torch.testing.assert_close(rank[strategy]["resumed"], expected, rtol=0, atol=0)
    last = run["directory"] / f"{strategy}2" / "last.ckpt"
    torch.testing.assert_close(fit_follower(tmp_path, "auto", 1, 3, last), expected, rtol=0, atol=0)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp_lora"])
def test_a_run_that_max_steps_ended_goes_on_with_the_next_batch(run: dict[str, Any], strategy: str) -> None:
    for rank in run["ranks"]:
        losses = rank[strategy]["end"]
        assert len(losses["straight"]) == 6
        assert losses["parts"] == losses["straight"]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp_lora"])
def test_nan_ends_all_ranks_before_anything_is_written(run: dict[str, Any], strategy: str) -> None:
    for rank in run["ranks"]:
        assert "layers.1.mlp.up_proj.lora_B' holds NaN or infinity" in rank[strategy]["nan"]
    assert not (run["directory"] / f"{strategy}_nan.ckpt").exists()


@pytest.mark.parametrize("strategy", ["ddp", "fsdp_lora"])
def test_a_loop_with_dropout_goes_on_bit_for_bit(run: dict[str, Any], strategy: str) -> None:
    losses = [rank["loops"][strategy] for rank in run["ranks"]]
    for rank in losses:
        assert rank["resumed"] == rank["straight"]
    assert losses[0]["straight"] != losses[1]["straight"]


def test_a_file_of_two_processes_says_that_one_draws_anew(
    run: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    loop = Loop("auto", 1, 5)
    before = torch.get_rng_state()
    loop.fabric.load(run["directory"] / "ddp.ckpt", loop.state)
    assert "written by 2 processes, this run has 1: random states are not restored" in caplog.text
    assert torch.equal(torch.get_rng_state(), before)


def test_a_bit_of_one_ranks_part_changes_the_hash_on_all_ranks(run: dict[str, Any]) -> None:
    hashes = run["ranks"][0]["hashes"]
    assert len(set(hashes)) == 3
    assert [rank["hashes"] for rank in run["ranks"]] == [hashes] * 2
