"""Which optimizers may step on parts of tensors, on two gloo ranks against steps on whole ones in one process."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.distributed.elementwise_script import OPTIMIZERS, stepped, whole_tensors
from tests.distributed.launch import launch

TOLERANCE = {"rtol": 1e-4, "atol": 1e-6}  # other order of sums
# what torch documents, or what is written in the script, as computed entry by entry or over ranks
RIGHT_ON_PARTS = {
    "ASGD", "Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD",
    "AdamW foreach", "AdamW fused", "AdamW amsgrad maximize", "Adam weight_decay decoupled_weight_decay",
    "SGD momentum nesterov weight_decay", "SGD momentum foreach", "SGD fused", "RMSprop centered momentum",
    "Adagrad lr_decay",
    "NeedsClosure ", "special", "grouped",
}  # fmt: skip
# wants sparse gradients; cannot be copied; knows a model; keeps tensors of the parameters' sizes outside of its state
NOT_TRIED = {"SparseAdam": "SparseAdam", "locked": "Locked", "holding": "Holding", "lookahead": "Lookahead"}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return launch("elementwise_script.py", 2, tmp_path_factory.mktemp("elementwise"))


def whole(name: str) -> list[Tensor]:
    params = [nn.Parameter(tensor) for tensor in whole_tensors(0)]
    return stepped(OPTIMIZERS[name](params), params)


def parts(tensors: list[Tensor], rank: int) -> list[Tensor]:
    return [tensors[0].chunk(2, 0)[rank], tensors[1].chunk(2, 1)[rank], tensors[2]]


@pytest.mark.parametrize("name", sorted(set(OPTIMIZERS) - set(NOT_TRIED)))
def test_an_optimizer_of_split_tensors_passes_if_and_only_if_its_steps_are_right(ranks: list[Any], name: str) -> None:
    expected = whole(name)
    for index, rank in enumerate(ranks):
        found = rank["tagged"][name]
        try:
            torch.testing.assert_close(found["stepped"], parts(expected, index), **TOLERANCE)
            is_right = True
        except AssertionError:
            is_right = False
        assert found["verdict"].startswith("passed" if name in RIGHT_ON_PARTS else "refused")
        assert is_right is (name in RIGHT_ON_PARTS)


@pytest.mark.parametrize("name", sorted(set(OPTIMIZERS) - set(NOT_TRIED)))
def test_an_optimizer_of_dtensors_passes_only_if_its_steps_are_right(ranks: list[Any], name: str) -> None:
    for index, rank in enumerate(ranks):
        found = rank["DTensor"][name]
        if found["verdict"] == "passed":
            torch.testing.assert_close(found["stepped"], parts(whole(name), index), **TOLERANCE)
        else:
            assert "shard_adapters=False" in found["verdict"]
            assert name not in RIGHT_ON_PARTS or "error" in found  # torch itself cannot step on them beside whole ones


@pytest.mark.parametrize("name", NOT_TRIED)
def test_an_optimizer_that_cannot_be_tried_passes_with_a_warning(ranks: list[Any], name: str) -> None:
    for kind in ("tagged", "DTensor"):
        assert ranks[0][kind][name]["verdict"].startswith(f"untried: {NOT_TRIED[name]} could not be tried")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_neither_the_optimizer_nor_the_random_state_is_touched(ranks: list[Any], name: str) -> None:
    for rank in ranks:
        assert rank["tagged"][name]["untouched"]
        assert rank["DTensor"][name]["untouched"]


def test_a_run_with_a_factored_optimizer_is_refused_at_the_start_where_adapters_are_in_parts(ranks: list[Any]) -> None:
    for rank in ranks:
        for strategy, remedy in (("megatron_lora", "strategy='fsdp_lora'"), ("shard_adapters", "shard_adapters=False")):
            for error in rank["runs"][strategy]:
                assert "Adafactor with these settings does not step on parts" in error
                assert remedy in error
        assert rank["runs"]["fsdp_lora"] == ["none", "none"]
