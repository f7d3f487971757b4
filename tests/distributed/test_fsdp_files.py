"""Files of ``fsdp_lora`` on 2 and 4 gloo ranks: what they hold, and runs of any strategy that go on from them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_lora import FSDPLoRAStrategy
from tests.distributed.ranks import on_ranks
from tests.distributed.training import (
    EXACT,
    SHARDED,
    STEP_TOLERANCE,
    Recorded,
    alone,
    fit,
    optimizer_state,
    rank_of,
    state,
)

both = pytest.mark.parametrize("num_ranks", [2, 4])


@pytest.fixture(scope="module")
def single(directory: Path) -> dict[str, Tensor]:
    """Return the adapters of two epochs on one process."""
    return state(alone(directory=directory / "single", max_epochs=2))


@on_ranks()
def two_epochs(directory: Path, num_ranks: int) -> dict[str, Any]:
    """Train with a file of each epoch; return the losses of this rank, and the adapters."""
    module = Recorded()
    fit(directory, module, FSDPLoRAStrategy(**SHARDED), max_epochs=2)
    return {"losses": module.losses, "adapters": state(module)}


@pytest.fixture(scope="module")
def straight(directory: Path) -> dict[int, list[Any]]:
    """Return by their number what each rank ended with; the files are in folders ``2`` and ``4``."""
    return {number: two_epochs(directory / str(number), num_ranks=number) for number in (2, 4)}


def resumed(path: Any, strategy: Any = "fsdp_lora") -> Recorded:
    """Train the second of two epochs."""
    module = Recorded()
    fit(None, module, strategy, ckpt_path=path, max_epochs=2)
    assert module.trainer.global_step == 8
    return module


@both
def test_one_file_holds_the_adapters_alone(
    straight: dict[int, list[Any]], single: dict[str, Tensor], directory: Path, num_ranks: int
) -> None:
    files = directory / str(num_ranks)
    assert sorted(path.name for path in files.iterdir()) == ["epoch=0.ckpt", "epoch=1.ckpt"]
    saved = torch.load(files / "epoch=1.ckpt", weights_only=True)
    theirs = {name.removeprefix("model."): value for name, value in saved["state_dict"].items()}
    torch.testing.assert_close(theirs, straight[num_ranks][0]["adapters"], **EXACT)
    assert all(type(value) is torch.Tensor for value in theirs.values())
    of_one = torch.load(directory / "single" / "epoch=1.ckpt", weights_only=True)
    assert saved.keys() == of_one.keys()
    base, expected = (file["lightning_lora"]["adapters"][0]["base"] for file in (saved, of_one))
    assert base["names"] == expected["names"]
    assert torch.equal(base["hashes"], expected["hashes"])
    assert base["embeddings"] == expected["embeddings"]


@on_ranks(2)
def test_resume_on_the_same_ranks_is_bit_exact(straight: dict[int, list[Any]], directory: Path) -> None:
    module, expected = resumed(directory / "2" / "epoch=0.ckpt"), straight[2][rank_of()[0]]
    assert module.losses == expected["losses"][4:]
    torch.testing.assert_close(state(module), expected["adapters"], **EXACT)


@on_ranks(2)
def test_files_of_ddp_and_of_one_process_resume(tmp_path: Path, single: dict[str, Tensor], directory: Path) -> None:
    fit(tmp_path, Recorded(), "ddp")
    for path in (tmp_path, directory / "single"):
        torch.testing.assert_close(state(resumed(path / "epoch=0.ckpt")), single, **STEP_TOLERANCE)


@on_ranks(2, 4)
def test_files_of_other_numbers_of_ranks_resume(
    straight: dict[int, list[Any]], single: dict[str, Tensor], directory: Path, num_ranks: int
) -> None:
    module = resumed(directory / str(6 - num_ranks) / "epoch=0.ckpt")
    torch.testing.assert_close(state(module), single, **STEP_TOLERANCE)


@on_ranks(2)
def test_paths_for_fsspec_are_read_and_written(tmp_path: Path, straight: dict[int, list[Any]], directory: Path) -> None:
    rank, expected = rank_of()[0], straight[2]
    module = resumed(f"file://{directory}/2/epoch=0.ckpt")
    assert module.losses == expected[rank]["losses"][4:]
    module.trainer.save_checkpoint(f"file://{tmp_path}/url.ckpt")
    if rank == 0:
        written = torch.load(tmp_path / "url.ckpt", weights_only=True)["state_dict"]
        adapters = {name.removeprefix("model."): value for name, value in written.items()}
        torch.testing.assert_close(adapters, expected[0]["adapters"], **EXACT)


@on_ranks(2)
def test_the_file_resumes_under_ddp(straight: dict[int, list[Any]], directory: Path) -> None:
    losses = resumed(directory / "2" / "epoch=0.ckpt", "ddp").losses
    torch.testing.assert_close(losses, straight[2][rank_of()[0]]["losses"][4:], **STEP_TOLERANCE)


@both
@pytest.mark.usefixtures("straight")
def test_the_file_resumes_on_one_process(single: dict[str, Tensor], directory: Path, num_ranks: int) -> None:
    module = resumed(directory / str(num_ranks) / "epoch=0.ckpt", "auto")
    torch.testing.assert_close(state(module), single, **STEP_TOLERANCE)


@on_ranks(2)
def test_weights_and_moments_are_bit_equal_after_loading(straight: dict[int, list[Any]], directory: Path) -> None:
    path = directory / "2" / "epoch=1.ckpt"
    module, saved = resumed(path), torch.load(path, weights_only=True)
    weights = {name.removeprefix("model."): value for name, value in saved["state_dict"].items()}
    torch.testing.assert_close(state(module), weights, **EXACT)
    moments = list(saved["optimizer_states"][0]["state"].values())
    torch.testing.assert_close(optimizer_state(module), moments, **EXACT)


@on_ranks(2)
def test_the_file_loads_without_any_strategy(straight: dict[int, list[Any]], directory: Path) -> None:
    loaded = Recorded.load_from_checkpoint(directory / "2" / "epoch=1.ckpt")
    torch.testing.assert_close(state(loaded), straight[2][0]["adapters"], **EXACT)
