"""Files of ``megatron_lora`` on 2 and 4 gloo ranks, and runs of any strategy that go on from them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_lora.ops.sharded import local_part
from tests.distributed.ranks import on_ranks
from tests.distributed.split import LAYOUTS, AtMidway, Module, layouts, run
from tests.distributed.training import EXACT, STEP_TOLERANCE, alone, fit, rank_of, state


@pytest.fixture(scope="module")
def single(directory: Path) -> dict[str, Tensor]:
    """Return the adapters of two epochs on one process."""
    return state(alone(Module(), directory=directory / "single", max_epochs=2))


@on_ranks()
def train(directory: Path, num_ranks: int, size: int, max_epochs: int) -> list[float]:
    """Train with a file of each epoch; return the losses of this rank."""
    _, module = run(directory, size, max_epochs=max_epochs, validates=False)
    return list(module.losses)


def folder(num_ranks: int, size: int) -> str:
    return f"tp{size} on {num_ranks}"


@pytest.fixture(scope="module")
def losses(directory: Path) -> dict[str, list[list[float]]]:
    """Return the losses of every rank by the folder of its files, for all layouts; of the first layout two epochs."""
    found = {}
    for (num_ranks, size), max_epochs in zip(LAYOUTS, (2, 1, 1), strict=True):
        name = folder(num_ranks, size)
        found[name] = train(directory / name, num_ranks=num_ranks, size=size, max_epochs=max_epochs)
    return found


@on_ranks(2)
def one_epoch_of(directory: Path, strategy: str) -> None:
    fit(directory, Module(), strategy)


@pytest.fixture(scope="module")
def others(directory: Path) -> None:
    for strategy in ("fsdp_lora", "ddp"):
        one_epoch_of(directory / strategy, strategy)


@layouts
@pytest.mark.usefixtures("losses", "single")
def test_the_file_is_that_of_one_process(directory: Path, num_ranks: int, size: int) -> None:
    folders = (directory / folder(num_ranks, size), directory / "single")
    one, other = (torch.load(path / "epoch=0.ckpt", weights_only=True) for path in folders)
    assert list(one["state_dict"]) == list(other["state_dict"])
    torch.testing.assert_close(dict(one["state_dict"]), dict(other["state_dict"]), **STEP_TOLERANCE)
    ours, theirs = (file["lightning_lora"]["adapters"][0]["base"] for file in (one, other))
    assert torch.equal(ours["hashes"], theirs["hashes"])
    assert ours["names"] == theirs["names"]
    moments, expected = (file["optimizer_states"][0]["state"] for file in (one, other))
    for own, whole in zip(moments.values(), expected.values(), strict=True):
        torch.testing.assert_close(own, whole, **STEP_TOLERANCE)


# ranks, and where the file was written; on four ranks two replicas of two parts go on
RESUMED = [(2, "tp2 on 2"), (2, "fsdp_lora"), (2, "ddp"), (2, "single"), (4, "tp4 on 4"), (4, "single")]


@pytest.mark.parametrize(("num_ranks", "source"), RESUMED)
@pytest.mark.usefixtures("others")
@on_ranks()
def test_files_of_any_strategy_resume_with_the_moments_that_were_saved(
    directory: Path, single: dict[str, Tensor], losses: dict[str, Any], num_ranks: int, source: str
) -> None:
    path, (rank, _) = directory / source / "epoch=0.ckpt", rank_of()
    module, midway = Module(), AtMidway()
    run(None, 2, module, ckpt_path=path, max_epochs=2, callbacks=(midway,), validates=False)
    torch.testing.assert_close(state(module), single, **STEP_TOLERANCE)
    if source == "tp2 on 2":
        assert module.losses == losses[source][rank][4:]

    saved = torch.load(path, weights_only=True)["optimizer_states"][0]["state"]
    for own, whole in zip(midway.moments, saved.values(), strict=True):
        for key, value in own.items():
            expected = whole[key]
            if value.shape != expected.shape:  # of two ranks that share a model, one has the first part
                dim = next(d for d in range(2) if value.shape[d] != expected.shape[d])
                expected = expected.chunk(2, dim)[rank % 2]
            torch.testing.assert_close(local_part(value), expected, **EXACT)


@pytest.mark.usefixtures("losses")
@on_ranks(2)
def test_the_file_resumes_under_fsdp(directory: Path, single: dict[str, Tensor]) -> None:
    module = Module()
    fit(None, module, "fsdp_lora", max_epochs=2, ckpt_path=directory / "tp2 on 2" / "epoch=0.ckpt")
    torch.testing.assert_close(state(module), single, **STEP_TOLERANCE)


@pytest.mark.usefixtures("losses")
def test_the_file_resumes_on_one_process(directory: Path, single: dict[str, Tensor]) -> None:
    module = alone(Module(), max_epochs=2, ckpt_path=directory / "tp2 on 2" / "epoch=0.ckpt")
    torch.testing.assert_close(state(module), single, **STEP_TOLERANCE)
