"""Runs that signals stop: on one rank, on all, on all with one behind, at places drawn at random, twenty times each."""

from typing import Any

import pytest
import torch

from tests.distributed.launch import launch
from tests.distributed.signals_script import ACCUMULATED, BATCHES, EPOCHS, STOPS

SCONTROL = '#!/bin/sh\necho "$@" >> "$REQUEUED"\n'


@pytest.fixture(scope="module", params=["ddp", "fsdp_lora", "megatron_lora"])
def strategy(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module", params=["one", "all", "straggler"])
def who(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def run(strategy: str, who: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    directory = tmp_path_factory.mktemp(f"{strategy}-{who}")
    (directory / "scontrol").write_text(SCONTROL)
    (directory / "scontrol").chmod(0o755)
    return {"directory": directory, "ranks": launch("signals_script.py", 2, directory, strategy, who)}


def test_every_signal_stops_all_ranks_at_the_same_step(run: dict[str, Any], who: str) -> None:
    first, second = (rank[who]["stops"] for rank in run["ranks"])
    assert first == second
    assert len(first) == STOPS


def test_a_run_that_was_stopped_ends_like_one_that_was_not(run: dict[str, Any], who: str) -> None:
    for rank in run["ranks"]:
        assert rank[who]["counted"] == rank["nobody"]["counted"]
        assert rank[who]["losses"] == rank["nobody"]["losses"]
        assert len(rank[who]["losses"]) == EPOCHS * BATCHES
        torch.testing.assert_close(rank[who]["adapters"], rank["nobody"]["adapters"], rtol=0, atol=0)
    assert run["ranks"][0]["nobody"]["counted"][0] == EPOCHS * BATCHES // ACCUMULATED


def test_slurms_signal_requeues_the_job_once(run: dict[str, Any], who: str) -> None:
    requeued = (run["directory"] / who / "requeued.txt").read_text().splitlines()
    assert requeued == ["requeue 4711"] * sum(kind == "SIGUSR1" for kind, _, _ in run["ranks"][0][who]["stops"])
    assert requeued
