"""Layers that ranks skip, each its own, under plain DDP on two gloo ranks against one process with both ranks' rows."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.fsdp_script import state
from tests.distributed.launch import launch
from tests.distributed.skipping_script import SIZE, SKIPPED, Manual, Skipping, by_hand, run

TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}  # other order of sums
TENSORS, ELEMENTS = 6, 3 * 2 * 2 * SIZE  # three layers, two factors of rank 2


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return launch("skipping_script.py", 2, tmp_path_factory.mktemp("skipping"))


def test_every_step_equals_one_process(ranks: list[Any], tmp_path: Path) -> None:
    single = run(tmp_path, Skipping(), "auto")
    for rank in ranks:
        torch.testing.assert_close(rank["adapters"], state(single), **TOLERANCE)


def test_what_no_rank_used_has_no_gradient(ranks: list[Any], tmp_path: Path) -> None:
    single = run(tmp_path, Skipping(), "auto")
    assert any(single.none)
    for rank in ranks:
        assert rank["none"] == single.none


def test_a_step_reduces_all_gradients_at_once(ranks: list[Any]) -> None:
    for rank in ranks:
        assert [size for size in rank["all_reduces"] if size > 1] == [TENSORS + ELEMENTS] * 2 * len(SKIPPED)


@pytest.mark.parametrize(
    ("name", "build", "settings"),
    [("accumulated", Skipping, {"accumulate_grad_batches": 2}), ("manual", Manual, {})],
)
def test_accumulation_and_turns_of_optimizers_equal_one_process(
    ranks: list[Any], tmp_path: Path, name: str, build: Any, settings: dict[str, Any]
) -> None:
    single = run(tmp_path, build(), "auto", **settings)
    for rank in ranks:
        torch.testing.assert_close(rank[name], state(single), **TOLERANCE)


def test_fabric_equals_one_process_and_refuses_a_second_backward_of_one_forward(ranks: list[Any]) -> None:
    _, single = by_hand((0, 1))
    for rank in ranks:
        torch.testing.assert_close(rank["fabric"]["adapters"], single, **TOLERANCE)
        assert "two backwards came after one forward" in rank["fabric"]["twice"]


def test_layerdrop_is_refused_where_ranks_gather_what_others_skip(ranks: list[Any]) -> None:
    for rank in ranks:
        assert "layerdrop=0.5" in rank["fsdp"]
        assert "'ddp'" in rank["fsdp"]
