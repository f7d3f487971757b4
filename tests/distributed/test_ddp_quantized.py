"""DDP over a quantised base on 2 gloo ranks: equal to one process, in outputs, gradients, steps and the file."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_lora.layers.quantized_linear import QuantizedLinear
from tests.distributed.ranks import on_ranks
from tests.distributed.training import (
    EXACT,
    GRADIENT_TOLERANCE,
    PROMPTS,
    STEP_TOLERANCE,
    Recorded,
    fit,
    rank_of,
    state,
)

LORA = {"quantize": "nf4-dq"}


def trained(directory: Path | None, strategy: str = "ddp", *, wrong: bool = False, **settings: Any) -> dict[str, Any]:
    """Train an epoch of four steps; return what a rank has then."""
    module = Recorded()
    if wrong and rank_of()[0]:  # as a rank whose weights were read from another file
        module.model.model.layers[0].mlp.up_proj.weight.data.add_(0.1)
    fit(directory, module, strategy, lora=LORA, **settings)
    packed = {
        f"{name}.{part}": getattr(layer, part).clone()
        for name, layer in module.named_modules()
        if isinstance(layer, QuantizedLinear)
        for part in layer.part_names()
    }
    with torch.no_grad():
        outputs = module.model(PROMPTS).logits
    return {
        "gradients": module.gradients,
        "adapters": state(module),
        "losses": module.losses,
        "packed": packed,
        "outputs": outputs,
    }


@pytest.fixture(scope="module")
@on_ranks(2)
def two(directory: Path) -> dict[str, Any]:
    return trained(directory / "two")


@pytest.fixture(scope="module")
def one(directory: Path) -> dict[str, Any]:
    return trained(directory / "one", "auto")


def test_outputs_gradients_and_steps_equal_one_process(two: list[Any], one: dict[str, Any]) -> None:
    torch.testing.assert_close(two[0]["gradients"], one["gradients"], **GRADIENT_TOLERANCE)
    for what in ("adapters", "outputs"):
        torch.testing.assert_close(two[0][what], one[what], **STEP_TOLERANCE)


def test_replicas_and_packed_bytes_are_bit_equal(two: list[Any], one: dict[str, Any]) -> None:
    torch.testing.assert_close(two[1]["adapters"], two[0]["adapters"], **EXACT)
    torch.testing.assert_close(two[1]["outputs"], two[0]["outputs"], **EXACT)
    for rank in two:
        torch.testing.assert_close(rank["packed"], one["packed"], **EXACT)
    assert len(one["packed"]) == 14 * 4


def test_the_file_is_that_of_one_process(two: list[Any], one: dict[str, Any], directory: Path) -> None:
    theirs, ours = (torch.load(directory / n / "epoch=0.ckpt", weights_only=True) for n in ("two", "one"))
    torch.testing.assert_close(theirs["state_dict"], ours["state_dict"], **STEP_TOLERANCE)
    bases = [file["lightning_lora"]["adapters"][0]["base"] for file in (theirs, ours)]
    assert bases[0].pop("hashes").tolist() == bases[1].pop("hashes").tolist()
    assert bases[0] == bases[1]


@on_ranks(2)
def test_a_rank_with_other_weights_gets_those_of_rank_0(one: dict[str, Any]) -> None:
    torch.testing.assert_close(trained(None, wrong=True)["packed"], one["packed"], **EXACT)


@on_ranks(2)
def test_a_resume_is_bit_exact(directory: Path, two: list[Any]) -> None:
    straight = trained(None, max_epochs=2)
    resumed = trained(None, max_epochs=2, ckpt_path=directory / "two" / "epoch=0.ckpt")
    assert resumed["losses"] == straight["losses"][4:]
    torch.testing.assert_close(resumed["adapters"], straight["adapters"], **EXACT)
