"""``if trainer.is_global_zero: save_peft(...)`` on two gloo ranks: it works, or says that all ranks must call it."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_lora import adapter_state_dict, load_peft
from tests import models
from tests.distributed.alone_script import SPREAD, STRATEGIES
from tests.distributed.launch import launch

STEP_TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}  # lr 1e-2 / eps 1e-4 turns a rounding of 1e-8 into 1e-6 per step
EXACT = {"rtol": 0.0, "atol": 0.0}
WHOLE = tuple(name for name in STRATEGIES if name not in SPREAD)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    directory = tmp_path_factory.mktemp("alone")
    return {"directory": directory, "ranks": launch("alone_script.py", 2, directory)}


def read(directory: Path) -> dict[str, Any]:
    return dict(adapter_state_dict(load_peft(models.llama(), directory)))


@pytest.mark.parametrize("strategy", WHOLE)
def test_rank_zero_writes_whole_adapters_alone(run: dict[str, Any], strategy: str) -> None:
    zero = run["ranks"][0][strategy]
    assert zero["errors"] == []
    torch.testing.assert_close(read(run["directory"] / strategy / "alone"), zero["alone"], **EXACT)


@pytest.mark.parametrize("strategy", SPREAD)
def test_rank_zero_alone_is_told_that_all_must_call_where_adapters_are_spread(
    run: dict[str, Any], strategy: str
) -> None:
    first, second = run["ranks"][0][strategy]["errors"]
    assert "save_peft was called on rank 0, and not on rank 1 in time" in first
    assert "adapter_state_dict was called on rank 0, and not on rank 1 in time" in second
    assert "all ranks must call it" in first
    assert run["ranks"][1][strategy]["errors"] == []
    assert not (run["directory"] / strategy / "alone").exists()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_all_ranks_write_together_afterwards(run: dict[str, Any], strategy: str) -> None:
    for rank in run["ranks"]:
        torch.testing.assert_close(read(run["directory"] / strategy / "together"), rank[strategy]["together"], **EXACT)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_run_goes_on_as_if_nobody_had_asked(run: dict[str, Any], strategy: str) -> None:
    for rank in run["ranks"]:
        torch.testing.assert_close(rank[strategy]["ended"], run["ranks"][0]["ddp"]["ended"], **STEP_TOLERANCE)
