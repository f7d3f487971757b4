"""Checkpoints of a ``GPTModel`` on 2 and 4 gloo ranks: one layout's file under another."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_lora.ops.sharded import split_over, whole
from tests.distributed.gpt import STEP_TOLERANCE, Alone, Module, adapters, run
from tests.distributed.ranks import on_ranks
from tests.distributed.split import AtMidway
from tests.distributed.training import EXACT, alone, from_all_ranks, state

# ranks, how many of them share a model, sequence parallelism
LAYOUTS = [(2, 1, False), (2, 2, False), (2, 2, True), (4, 2, False), (4, 4, True)]


@pytest.fixture(scope="module")
def single() -> tuple[dict[str, Tensor], list[float]]:
    """Return adapters and losses of two epochs of Hugging Face's model on one process."""
    module = alone(Alone(), max_epochs=2)
    return state(module), module.losses


@on_ranks()
def one_epoch(directory: Path, hf: Path, num_ranks: int, size: int, sequence_parallel: bool) -> None:
    run(directory, size, Module(hf, sequence_parallel=sequence_parallel))


@pytest.fixture(scope="module")
def files(directory: Path, hf: Path) -> dict[tuple[int, int, bool], Path]:
    """Return the file of one epoch in each layout."""
    found = {}
    for layout in LAYOUTS:
        num_ranks, size, sequence_parallel = layout
        folder = directory / f"{num_ranks} ranks, {size}, {sequence_parallel}"
        one_epoch(folder, hf, num_ranks=num_ranks, size=size, sequence_parallel=sequence_parallel)
        found[layout] = folder / "epoch=0.ckpt"
    return found


def whole_moments(module: Module, states: Any) -> dict[str, Tensor]:
    """Return Adam's moments by parameter, put together."""
    names = {id(p): (n, p) for n, p in module.named_parameters()}
    [optimizer] = module.trainer.optimizers
    order = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    found: dict[str, Tensor] = {}
    for (name, parameter), own in zip(order, states, strict=True):
        for key, value in own.items():
            if hasattr(parameter, "lora_split") and value.shape == parameter.shape:
                value = value.clone()
                split_over(value, *parameter.lora_split)
            found[f"{name}.{key}"] = whole(value)
    return found


# ranks, how many of them share a model, and the layout whose file is read
RESUMED = [*((2, 2, layout) for layout in LAYOUTS[:3]), (4, 4, LAYOUTS[3]), (4, 2, LAYOUTS[4])]


@pytest.mark.parametrize(("num_ranks", "size", "written"), RESUMED)
@on_ranks()
def test_a_checkpoint_of_any_layout_resumes_under_another_with_its_moments(
    hf: Path, files: dict[Any, Path], single: tuple[Any, Any], num_ranks: int, size: int, written: Any
) -> None:
    module, midway, (expected, losses) = Module(hf), AtMidway(), single
    run(None, size, module, ckpt_path=files[written], max_epochs=2, callbacks=(midway,))
    torch.testing.assert_close(adapters(module), expected, **STEP_TOLERANCE)
    mean_losses = torch.tensor(from_all_ranks(module.losses)).mean(0)
    torch.testing.assert_close(mean_losses, torch.tensor(losses[4:]), **STEP_TOLERANCE)

    file = torch.load(files[written], weights_only=True)
    (names,) = file["lightning_lora"]["optimizers"][0]
    saved = file["optimizer_states"][0]["state"]
    moments = {f"{name}.{key}": v for name, one in zip(names, saved.values(), strict=True) for key, v in one.items()}
    torch.testing.assert_close(whole_moments(module, midway.moments), moments, **EXACT)


@on_ranks(2)
def test_a_checkpoint_of_parts_resumes_as_replicas(hf: Path, files: dict[Any, Path], single: tuple[Any, Any]) -> None:
    module = Module(hf)
    run(None, 1, module, ckpt_path=files[2, 2, False], max_epochs=2)
    torch.testing.assert_close(adapters(module), single[0], **STEP_TOLERANCE)


def test_files_of_all_layouts_hold_the_same(files: dict[Any, Path]) -> None:
    first, *others = (torch.load(path, weights_only=True) for path in files.values())
    for other in others:
        assert list(first["state_dict"]) == list(other["state_dict"])
        torch.testing.assert_close(dict(first["state_dict"]), dict(other["state_dict"]), **STEP_TOLERANCE)
        ours, theirs = (file["lightning_lora"]["adapters"][0]["base"] for file in (first, other))
        assert ours["names"] == theirs["names"]
        assert torch.equal(ours["hashes"], theirs["hashes"])
