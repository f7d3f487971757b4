"""Many models under ``fsdp_lora`` in Fabric, on 2 and 4 gloo ranks, each against itself in one process."""

from typing import Any

import pytest
import torch

from tests import zoo
from tests.distributed.fsdp_models_script import CASES
from tests.distributed.launch import launch

GRADIENT_TOLERANCE = {"rtol": 1e-4, "atol": 1e-6}  # other order of sums, over ranks and in products of fewer rows
# lr 1e-3 / eps 1e-4 turns a rounding of 1e-7 in a gradient into 1e-6 per step, and there are three
STEP_TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    # the zoo on two ranks is enough: what differs between models is how they call their parts
    which = "all" if request.param == 2 else "cases"
    return launch("fsdp_models_script.py", request.param, tmp_path_factory.mktemp(f"models{request.param}"), which)


@pytest.mark.parametrize("name", CASES)
def test_three_steps_equal_one_process(ranks: list[dict[str, Any]], name: str) -> None:
    for rank in ranks:
        found = rank["cases"][name]
        ours, expected = found["ours"], found["expected"]
        torch.testing.assert_close(ours["loss"], expected["loss"], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(ours["gradients"], expected["gradients"], **GRADIENT_TOLERANCE)
        torch.testing.assert_close(ours["adapters"], expected["adapters"], **STEP_TOLERANCE)
        torch.testing.assert_close(ours["adapters"], ranks[0]["cases"][name]["ours"]["adapters"], rtol=0, atol=0)


@pytest.mark.parametrize("name", CASES)
def test_the_base_is_in_shards(ranks: list[dict[str, Any]], name: str) -> None:
    assert ranks[0]["cases"][name]["spread"] > 0.4


@pytest.mark.parametrize("ranks", [2], indirect=True)
@pytest.mark.parametrize("name", [family.name for family in zoo.FAMILIES])
def test_every_family_gives_the_outputs_and_gradients_of_one_process(ranks: list[dict[str, Any]], name: str) -> None:
    for rank in ranks:
        found = rank["families"][name]
        torch.testing.assert_close(found["ours"]["output"], found["expected"]["output"], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found["ours"]["gradients"], found["expected"]["gradients"], **GRADIENT_TOLERANCE)
        assert found["spread"] > 0.3


@pytest.mark.parametrize("shards", [False, True])
def test_fabric_accumulates_clips_saves_and_goes_on(ranks: list[dict[str, Any]], shards: bool) -> None:
    for rank in ranks:
        found, other = rank["around"][f"shards={shards}"], ranks[0]["around"]["shards=False"]
        assert found["step"] == 2
        torch.testing.assert_close(found["back"], found["going_on"], rtol=0, atol=0)
        torch.testing.assert_close(found["norm"], other["norm"], rtol=1e-5, atol=0)
        torch.testing.assert_close(found["going_on"]["adapters"], other["going_on"]["adapters"], **STEP_TOLERANCE)


def test_a_first_forward_in_inference_mode_leaves_a_model_that_trains(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        before, after = rank["around"]["inference_first"]
        torch.testing.assert_close(before, after, rtol=1e-6, atol=0)


def test_what_no_rank_reaches_has_no_gradient_and_what_one_reaches_counts_as_zero_elsewhere(
    ranks: list[dict[str, Any]],
) -> None:
    for rank in ranks:
        ours, expected = rank["around"]["absent"]
        assert {name for name, value in ours.items() if value is None} == {"never.lora_A", "never.lora_B"}
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


def test_a_backward_may_reach_one_model_of_two(ranks: list[dict[str, Any]]) -> None:
    assert all(rank["unusual"]["untouched"] for rank in ranks)


def test_an_optimizer_of_the_parameters_before_sharding_is_refused(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert "call fabric.setup(model, optimizer) with both" in rank["unusual"]["apart"]


@pytest.mark.parametrize("way", ["removed", "merged"])
def test_sharded_adapters_are_taken_out_for_good(ranks: list[dict[str, Any]], way: str) -> None:
    for rank in ranks:
        loss, expected, left = rank["unusual"][way]
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
        assert left == []
        adapters = rank["unusual"]["adapted again"]
        assert {value.shape[0] for name, value in adapters.items() if name.endswith("lora_A")} == {3}
        torch.testing.assert_close(adapters, ranks[0]["unusual"]["adapted again"], rtol=0, atol=0)


def test_adapters_in_shards_that_ranks_lack_count_as_zero_there(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        ours, expected = rank["unusual"]["routed"]
        assert {name for name, value in ours.items() if value is None} == {n for n in expected if ".never." in n}
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)


def test_what_is_outside_trains_alike_and_stays_tied(ranks: list[dict[str, Any]]) -> None:
    expected = ranks[0]["unusual"]["outside, shards=False"]
    for rank in ranks:
        torch.testing.assert_close(rank["unusual"]["outside, shards=False"], expected, rtol=0, atol=0)
        torch.testing.assert_close(rank["unusual"]["outside, shards=True"], expected, **STEP_TOLERANCE)
