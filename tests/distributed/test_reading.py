"""Gradients that a user reads or changes between backward and step, on two gloo ranks against one process."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.ddp_script import rank_loader
from tests.distributed.fsdp_script import fit, state
from tests.distributed.launch import launch
from tests.distributed.reading_script import READINGS, STRATEGIES, Reader, clamped

STEP_TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}  # other order of sums


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return launch("reading_script.py", 2, tmp_path_factory.mktemp("reading"))


def alone(directory: Path, module: Reader) -> Reader:
    fit(directory, module, "auto", loaders={"train_dataloaders": rank_loader(0, 1)})
    return module


@pytest.mark.parametrize("reading", [*READINGS, "after the step", "accumulating", "Fabric"])
def test_what_reads_a_part_as_if_it_were_whole_is_refused_with_the_remedy(ranks: list[Any], reading: str) -> None:
    for rank in ranks:
        error = rank["refused"][reading]
        assert "split over tensor-parallel ranks" in error
        assert "self.clip_gradients" in error
        assert "fabric.clip_gradients" in error


def test_torchs_error_about_gradients_in_shards_beside_whole_ones_names_the_remedy(ranks: list[Any]) -> None:
    for rank in ranks:
        assert "mixed torch.Tensor and DTensor" in rank["refused"]["in shards"]
        assert "clip with Trainer(gradient_clip_val=...)" in rank["refused"]["in shards"]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_reads_a_gradient_before_it_is_averaged_is_refused(ranks: list[Any], strategy: str) -> None:
    for rank in ranks:
        error = rank["refused"][f"past {strategy}"]
        # with one data-parallel rank, parts are averaged over nobody
        assert "before it was averaged" in error or (strategy == "megatron_lora" and "split over" in error)
        assert "self.clip_gradients" in error


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("when", ["at once", "late"])
def test_adapters_that_drift_apart_are_found_at_the_first_steps_and_at_every_save(
    ranks: list[Any], strategy: str, when: str
) -> None:
    for rank in ranks:
        error = rank["drift"][f"{strategy} {when}"]
        assert "the ranks train different adapters" in error
        assert "lora_" in error
        assert "self.clip_gradients" in error


def test_clamping_every_entry_equals_one_process(ranks: list[Any], tmp_path: Path) -> None:
    expected = state(alone(tmp_path, Reader.doing(clamped)))
    for rank in ranks:
        torch.testing.assert_close(rank["clamped"], expected, **STEP_TOLERANCE)


def test_torchs_clipping_is_served_where_a_part_is_all(ranks: list[Any], tmp_path: Path) -> None:
    expected = state(alone(tmp_path, Reader.doing(READINGS["clip_grad_norm_"])))
    for rank in ranks:
        torch.testing.assert_close(rank["clipped"], expected, **STEP_TOLERANCE)


def test_the_norm_of_the_whole_equals_one_process(ranks: list[Any], tmp_path: Path) -> None:
    norm = alone(
        tmp_path,
        Reader.doing(
            lambda module: torch.nn.utils.get_total_norm([p.grad for p in module.parameters() if p.grad is not None])
        ),
    )
    for rank in ranks:
        torch.testing.assert_close(rank["norms"], [float(one) for one in norm.found], rtol=1e-4, atol=0)
