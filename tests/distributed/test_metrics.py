"""Sums, metrics and gathers under ``megatron_lora`` on gloo ranks against one process: each batch counts once."""

from typing import Any

import pytest
import torch

from tests import models
from tests.distributed.ddp_script import rank_loader
from tests.distributed.launch import launch
from tests.distributed.metrics_script import FABRIC_ROWS, Counting, counted


@pytest.fixture(scope="module", params=[2, 4], ids=["TP 2", "TP 2 x DP 2"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    directory = tmp_path_factory.mktemp(f"metrics{request.param}")
    replicas = request.param // 2
    # the rows that a rank of a replica sees, one replica behind the other: what ranks of a run without TP see
    single = counted(directory / "single", Counting(), "auto", rank_loader(0, 1))
    return {"single": single, "replicas": replicas, "ranks": launch("metrics_script.py", request.param, directory)}


@pytest.mark.parametrize("name", ["tokens", "value", "accuracy", "train_rows", "train_mean"])
def test_what_is_logged_equals_one_process(run: dict[str, Any], name: str) -> None:
    for rank in run["ranks"]:
        assert rank["logged"][name] == pytest.approx(run["single"]["logged"][name], rel=1e-5)


def test_sums_and_extremes_are_over_every_replica_once(run: dict[str, Any]) -> None:
    loaders = [rank_loader(index, run["replicas"]) for index in range(run["replicas"])]
    means = torch.tensor([[batch.float().mean() for batch in loader] for loader in loaders])
    for rank in run["ranks"]:
        assert rank["logged"]["train_sum"] == pytest.approx(float(means.sum()), rel=1e-5)
        assert rank["logged"]["train_max"] == pytest.approx(float(means.max()))
        assert rank["logged"]["train_min"] == pytest.approx(float(means.min()))


def test_a_metric_and_its_copy_count_every_batch_once(run: dict[str, Any]) -> None:
    for rank in run["ranks"]:
        assert torch.equal(rank["confusion"], run["single"]["confusion"])
        assert torch.equal(rank["copied"], run["single"]["confusion"])


def test_a_gather_brings_every_row_once(run: dict[str, Any]) -> None:
    for rank in run["ranks"]:
        assert rank["seen"] == run["single"]["seen"]


def test_decisions_are_all_ranks(run: dict[str, Any]) -> None:
    for rank in run["ranks"]:
        assert rank["votes"] == [True, False, True, False]


def test_fabric_counts_every_row_once(run: dict[str, Any]) -> None:
    ids = models.token_ids(FABRIC_ROWS, 3)
    for rank in run["ranks"]:
        assert rank["fabric"]["sum"] == rank["fabric"]["metric"] == float(ids.sum())
        assert rank["fabric"]["mean"] == pytest.approx(float(ids.float().mean()))
        assert torch.equal(rank["fabric"]["gathered"], ids)


def test_before_a_model_is_there_a_sum_is_over_all_ranks(run: dict[str, Any]) -> None:
    for rank in run["ranks"]:
        assert rank["fabric"]["ranks"] == len(run["ranks"])
