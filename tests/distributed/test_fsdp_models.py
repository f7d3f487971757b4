"""Many models under ``fsdp_lora`` in Fabric, on 2 and 4 gloo ranks, each against itself in one process."""

import pytest
import torch

from tests import zoo
from tests.distributed.fsdp_models_script import CASES, IN_FOUR
from tests.distributed.launch import Launches

GRADIENT_TOLERANCE = {"rtol": 1e-4, "atol": 1e-6}  # other order of sums, over ranks and in products of fewer rows
# lr 1e-3 / eps 1e-4 turns a rounding of 1e-7 in a gradient into 1e-6 per step, and there are three
STEP_TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


CASES_ON = [(2, name) for name in CASES] + [(4, name) for name in IN_FOUR]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Launches:
    return Launches("fsdp_models_script.py", tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize(("num_ranks", "name"), CASES_ON)
def test_three_steps_equal_one_process(found: Launches, num_ranks: int, name: str) -> None:
    ranks = [rank[name] for rank in found(num_ranks, "cases")]
    for rank in ranks:
        ours, expected = rank["ours"], ranks[0]["expected"]
        torch.testing.assert_close(ours["loss"], expected["loss"], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(ours["gradients"], expected["gradients"], **GRADIENT_TOLERANCE)
        torch.testing.assert_close(ours["adapters"], expected["adapters"], **STEP_TOLERANCE)
        torch.testing.assert_close(ours["adapters"], ranks[0]["ours"]["adapters"], rtol=0, atol=0)


@pytest.mark.parametrize(("num_ranks", "name"), CASES_ON)
def test_the_base_is_in_shards(found: Launches, num_ranks: int, name: str) -> None:
    assert found(num_ranks, "cases")[0][name]["spread"] > 0.4


@pytest.mark.parametrize("name", [family.name for family in zoo.FAMILIES])
def test_every_family_gives_the_outputs_and_gradients_of_one_process(found: Launches, name: str) -> None:
    ranks = found(2, "families")
    for rank in ranks:
        ours, expected = rank[name]["ours"], ranks[0][name]["expected"]
        torch.testing.assert_close(ours["output"], expected["output"], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours["gradients"], expected["gradients"], **GRADIENT_TOLERANCE)
        assert rank[name]["spread"] > 0.3


@pytest.mark.parametrize("shards", [False, True])
def test_fabric_accumulates_clips_saves_and_goes_on(found: Launches, shards: bool) -> None:
    ranks = found(2, "around")
    for rank in ranks:
        case, other = rank[f"shards={shards}"], ranks[0]["shards=False"]
        assert case["step"] == 2
        torch.testing.assert_close(case["back"], case["going_on"], rtol=0, atol=0)
        torch.testing.assert_close(case["norm"], other["norm"], rtol=1e-5, atol=0)
        torch.testing.assert_close(case["going_on"]["adapters"], other["going_on"]["adapters"], **STEP_TOLERANCE)


def test_a_first_forward_in_inference_mode_leaves_a_model_that_trains(found: Launches) -> None:
    for rank in found(2, "around"):
        before, after = rank["inference_first"]
        torch.testing.assert_close(before, after, rtol=1e-6, atol=0)


def test_what_no_rank_reaches_has_no_gradient_and_what_one_reaches_counts_as_zero_elsewhere(found: Launches) -> None:
    for rank in found(2, "around"):
        ours, expected = rank["absent"]
        assert {name for name, value in ours.items() if value is None} == {"never.lora_A", "never.lora_B"}
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


def test_a_backward_may_reach_one_model_of_two(found: Launches) -> None:
    assert all(rank["untouched"] for rank in found(2, "unusual"))


def test_an_optimizer_of_the_parameters_before_sharding_is_refused(found: Launches) -> None:
    for rank in found(2, "unusual"):
        assert "call fabric.setup(model, optimizer) with both" in rank["apart"]


@pytest.mark.parametrize("way", ["removed", "merged"])
def test_sharded_adapters_are_taken_out_for_good(found: Launches, way: str) -> None:
    ranks = found(2, "unusual")
    for rank in ranks:
        loss, expected, left = rank[way]
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
        assert left == []
        adapters = rank["adapted again"]
        assert {value.shape[0] for name, value in adapters.items() if name.endswith("lora_A")} == {3}
        torch.testing.assert_close(adapters, ranks[0]["adapted again"], rtol=0, atol=0)


def test_adapters_in_shards_that_ranks_lack_count_as_zero_there(found: Launches) -> None:
    for rank in found(2, "unusual"):
        ours, expected = rank["routed"]
        assert {name for name, value in ours.items() if value is None} == {n for n in expected if ".never." in n}
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)


def test_what_is_outside_trains_alike_and_stays_tied(found: Launches) -> None:
    ranks = found(2, "unusual")
    expected = ranks[0]["outside, shards=False"]
    for rank in ranks:
        torch.testing.assert_close(rank["outside, shards=False"], expected, rtol=0, atol=0)
        torch.testing.assert_close(rank["outside, shards=True"], expected, **STEP_TOLERANCE)
