"""DDP on 2 and 4 gloo ranks against one process: gradients, steps, files, replicas."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric import Fabric

from lightning_lora import LoRAConfig, inject
from tests import models
from tests.distributed.counting import counted_collectives
from tests.distributed.ranks import on_ranks
from tests.distributed.training import (
    EXACT,
    GRADIENT_TOLERANCE,
    STEP_TOLERANCE,
    Recorded,
    alone,
    fit,
    rank_loader,
    rank_of,
    state,
)

TWO_EPOCHS = {"max_epochs": 2}


def train(directory: Path | None = None, **settings: Any) -> Recorded:
    module = Recorded()
    fit(directory, module, "ddp", **settings)
    return module


@pytest.fixture(scope="module", params=[2, 4])
def num_ranks(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture(scope="module")
def single(directory: Path) -> dict[str, Any]:
    """Return the first gradients and the last adapters of two epochs on one process."""
    module = alone(directory=directory / "single", **TWO_EPOCHS)
    return {"gradients": module.gradients, "adapters": state(module)}


@pytest.fixture(scope="module")
def files(directory: Path, num_ranks: int) -> Path:
    return directory / f"{num_ranks} ranks"


@pytest.fixture(scope="module")
@on_ranks()
def straight(files: Path, num_ranks: int) -> dict[str, Any]:
    """Train two epochs, with a file of each; return the losses of a rank, and its adapters."""
    with counted_collectives() as traffic:
        module = train(files, **TWO_EPOCHS)
    assert (torch.distributed.get_rank(), torch.distributed.get_world_size()) == rank_of()
    reduced = [size for size in traffic["all_reduce"] if size > 1]
    return {"gradients": module.gradients, "adapters": state(module), "losses": module.losses, "reduced": reduced}


def test_every_gradient_and_eight_steps_equal_one_process(straight: list[Any], single: dict[str, Any]) -> None:
    torch.testing.assert_close(straight[0]["gradients"], single["gradients"], **GRADIENT_TOLERANCE)
    torch.testing.assert_close(straight[0]["adapters"], single["adapters"], **STEP_TOLERANCE)


def test_replicas_are_bit_equal(straight: list[Any]) -> None:
    for rank in straight[1:]:
        torch.testing.assert_close(rank["adapters"], straight[0]["adapters"], **EXACT)


def test_a_step_reduces_all_gradients_at_once(straight: list[Any]) -> None:
    adapters = straight[0]["adapters"].values()
    # and a flag for each tensor, whether it is there
    assert straight[0]["reduced"] == [len(adapters) + sum(value.numel() for value in adapters)] * 8


def test_one_file_holds_the_adapters_alone(straight: list[Any], files: Path) -> None:
    assert sorted(path.name for path in files.iterdir()) == ["epoch=0.ckpt", "epoch=1.ckpt"]
    saved = torch.load(files / "epoch=1.ckpt", weights_only=True)
    theirs = {name.removeprefix("model."): value for name, value in saved["state_dict"].items()}
    torch.testing.assert_close(theirs, straight[0]["adapters"], **EXACT)
    assert len(saved["lightning_lora"]["random_states"]) == len(straight)


@on_ranks()
def test_resume_on_the_same_ranks_is_bit_exact(straight: list[Any], files: Path, num_ranks: int) -> None:
    resumed, expected = train(ckpt_path=files / "epoch=0.ckpt", **TWO_EPOCHS), straight[rank_of()[0]]
    assert resumed.losses == expected["losses"][4:]
    torch.testing.assert_close(state(resumed), expected["adapters"], **EXACT)


@on_ranks()
def test_resume_with_dropout_is_bit_exact_on_every_rank(tmp_path: Path, num_ranks: int) -> None:
    dropping = {"lora": {"dropout": 0.2}, **TWO_EPOCHS}
    pl.seed_everything(7, verbose=False)
    expected = train(tmp_path, **dropping)
    pl.seed_everything(1234, verbose=False)
    assert train(ckpt_path=tmp_path / "epoch=0.ckpt", **dropping).losses == expected.losses[4:]


@on_ranks()
def test_a_file_of_one_process_resumes_on_many(directory: Path, single: dict[str, Any], num_ranks: int) -> None:
    resumed = train(ckpt_path=directory / "single" / "epoch=0.ckpt", **TWO_EPOCHS)
    torch.testing.assert_close(state(resumed), single["adapters"], **STEP_TOLERANCE)


def test_a_file_of_many_resumes_on_one_process(straight: list[Any], files: Path, single: dict[str, Any]) -> None:
    module = alone(ckpt_path=files / "epoch=0.ckpt", **TWO_EPOCHS)
    torch.testing.assert_close(state(module), single["adapters"], **STEP_TOLERANCE)
    assert isinstance(module.trainer.strategy, pl.strategies.SingleDeviceStrategy)


@on_ranks()
def test_accumulation_steps_once_for_two_batches(num_ranks: int) -> None:
    assert train(accumulate_grad_batches=2, gradient_clip_val=0.05).trainer.global_step == 2


@on_ranks()
def test_fabric_resumes_exactly(tmp_path: Path, num_ranks: int) -> None:
    def start() -> tuple[Fabric, Any, Any]:
        fabric = Fabric(accelerator="cpu", devices=num_ranks, strategy="ddp")
        fabric.launch()
        model = inject(models.llama(), LoRAConfig(r=4))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        return fabric, *fabric.setup(model, optimizer)

    def losses(fabric: Fabric, model: Any, optimizer: Any) -> list[float]:
        losses = []
        for batch in rank_loader(fabric.global_rank, num_ranks):
            loss = model(input_ids=batch, labels=batch).loss
            fabric.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(fabric.all_reduce(loss.detach()).item())
        return losses

    fabric, model, optimizer = start()
    losses(fabric, model, optimizer)
    fabric.save(tmp_path / "fabric.ckpt", {"model": model, "optimizer": optimizer})
    going_on = losses(fabric, model, optimizer)
    fabric, twin, twin_optimizer = start()
    fabric.load(tmp_path / "fabric.ckpt", {"model": twin, "optimizer": twin_optimizer})
    assert losses(fabric, twin, twin_optimizer) == going_on
