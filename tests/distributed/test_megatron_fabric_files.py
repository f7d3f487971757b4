"""Fabric's files under ``megatron_lora`` on 2 and 4 gloo ranks: written, read back, and read by other strategies."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_lora import LoRACallback
from lightning_lora.fabric import FSDPLoRAStrategy
from tests import runs
from tests.distributed.ranks import on_ranks
from tests.distributed.split import four_heads
from tests.distributed.split_fabric import adapters, batches, make, start, step
from tests.distributed.training import EXACT, STEP_TOLERANCE, Recorded, rank_of


def saved_after_three_steps(fabric: Any, path: Path) -> tuple[Any, Any]:
    model, optimizer = fabric.setup(*make())
    for batch in list(batches(fabric))[:3]:
        step(fabric, model, optimizer, batch)
    fabric.save(path, {"model": model, "optimizer": optimizer, "step": 3})
    return model, optimizer


def read(path: Path) -> Any:
    return torch.load(path, weights_only=True)


@pytest.fixture(scope="module")
def single(directory: Path) -> Path:
    """Return the file of one process."""
    saved_after_three_steps(start(), directory / "single.ckpt")
    return directory / "single.ckpt"


@pytest.mark.parametrize(("num_ranks", "size"), [(2, 2), (4, 2), (4, 4)])
@on_ranks()
def test_the_file_is_that_of_one_process_and_a_step_after_loading_that_of_a_run_that_went_on(
    tmp_path: Path, single: Path, num_ranks: int, size: int
) -> None:
    fabric, path = start(tensor_parallel_size=size), tmp_path / "saved.ckpt"
    model, optimizer = saved_after_three_steps(fabric, path)
    twin, twin_optimizer = fabric.setup(*make())
    state = {"model": twin, "optimizer": twin_optimizer, "step": 0}
    fabric.load(path, state)
    assert state["step"] == 3
    fourth = list(batches(fabric))[3]
    step(fabric, model, optimizer, fourth)
    step(fabric, twin, twin_optimizer, fourth)
    torch.testing.assert_close(adapters(twin), adapters(model), **EXACT)

    written, expected = read(path), read(single)
    torch.testing.assert_close(written["model"], expected["model"], **STEP_TOLERANCE)
    torch.testing.assert_close(written["optimizer"]["state"], expected["optimizer"]["state"], **STEP_TOLERANCE)
    ours, theirs = (file["lightning_lora"]["adapters"][0]["base"] for file in (written, expected))
    assert torch.equal(ours["hashes"], theirs["hashes"])


@pytest.fixture(scope="module")
def of_trainer(directory: Path) -> Path:
    """Return a file of the Trainer's."""
    module = Recorded()
    module.model = four_heads()
    trainer = runs.trainer(directory, LoRACallback(r=4), limit_train_batches=2)
    trainer.fit(module, runs.loader())
    trainer.save_checkpoint(directory / "trainer.ckpt")
    return directory / "trainer.ckpt"


def moments(file: dict[str, Any]) -> Any:
    return (file["optimizer"] if "optimizer" in file else file["optimizer_states"][0])["state"]


def tensors(file: dict[str, Any]) -> Any:
    """Return the adapters of Fabric's file, or of the Trainer's."""
    if "model" in file:
        return file["model"]
    return {name.removeprefix("model."): value for name, value in file["state_dict"].items()}


def assert_written_again_as_read(fabric: Any, path: Path, again: Path) -> None:
    model, optimizer = fabric.setup(*make())
    fabric.load(path, {"model": model, "optimizer": optimizer})
    fabric.save(again, {"model": model, "optimizer": optimizer})
    if rank_of()[0] == 0:
        torch.testing.assert_close(read(again)["model"], tensors(read(path)), **EXACT)
        torch.testing.assert_close(read(again)["optimizer"]["state"], moments(read(path)), **EXACT)


@on_ranks(2)
def write_and_read_files_of_all(directory: Path, single: Path, of_trainer: Path) -> None:
    """Write files under ``fsdp_lora`` and ``megatron_lora``, and read under each what the other wrote."""
    sharding = start(FSDPLoRAStrategy())
    saved_after_three_steps(sharding, directory / "fsdp.ckpt")
    splitting = start(tensor_parallel_size=2)
    saved_after_three_steps(splitting, directory / "tp2.ckpt")
    for path in (single, directory / "tp2.ckpt", directory / "fsdp.ckpt", of_trainer):
        assert_written_again_as_read(splitting, path, directory / "again.ckpt")
    assert_written_again_as_read(start(FSDPLoRAStrategy()), directory / "tp2.ckpt", directory / "by fsdp.ckpt")


def test_any_file_is_written_again_as_it_was_read(tmp_path: Path, single: Path, of_trainer: Path) -> None:
    write_and_read_files_of_all(tmp_path, single, of_trainer)
    original, fabric = read(tmp_path / "tp2.ckpt"), start()
    model, optimizer = fabric.setup(*make())
    fabric.load(tmp_path / "tp2.ckpt", {"model": model, "optimizer": optimizer})
    torch.testing.assert_close(adapters(model), original["model"], **EXACT)
    torch.testing.assert_close(optimizer.state_dict()["state"], original["optimizer"]["state"], **EXACT)
