"""Files of three named adapters at different steps, on 2 gloo ranks: written and resumed by any strategy."""

import os
import signal
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_lora import LoRAConfig, active, adapters, named_adapter_parameters, save_peft
from tests import models
from tests.distributed.ranks import on_ranks
from tests.distributed.split import four_heads
from tests.distributed.training import STEP_TOLERANCE, fit, rank_of, state

CONFIGS = {
    "law": LoRAConfig(r=4),
    "medicine": LoRAConfig(r=2, target_modules=["q_proj", "v_proj"]),
    "code": LoRAConfig(r=3, target_modules=["up_proj", "down_proj"]),
}
# who acts in each epoch of one batch, alike in both halves of it: the ranks have the same adapters and numbers of rows
ACTING = [["law", "medicine"], ["law", "law"], ["code", None], ["medicine", "law"], ["code", "law"], ["law", None]]
STEPS = {3: {"law": 2, "medicine": 1, "code": 1}, 6: {"law": 5, "medicine": 2, "code": 2}}
STRATEGIES = ["ddp", "fsdp_lora", "megatron_lora"]


class Module(pl.LightningModule):
    """Notes the steps that each adapter has taken when an epoch begins, and may be killed in one."""

    def __init__(self, killed_in: int | None = None) -> None:
        super().__init__()
        self.model = four_heads()
        self.killed_in = killed_in
        self.steps: list[dict[str, int]] = []

    def on_train_epoch_start(self) -> None:
        self.steps.append(steps(self))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        names = ACTING[self.current_epoch] * (len(batch) // 2)
        with active(self.model, names):
            logits = self.model(input_ids=batch).logits
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self.current_epoch == self.killed_in:
            os.kill(os.getpid(), signal.SIGKILL)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2, eps=1e-4)


def steps(module: Module) -> dict[str, int]:
    """Return how many steps the optimizer has taken with each adapter, the same with all of its tensors."""
    (optimizer,) = module.trainer.optimizers
    found: dict[str, set[int]] = {name: set() for name in adapters(module.model)}
    for name, parameter in named_adapter_parameters(module):
        (owner,) = [one for one in found if f".lora.{one}." in name]
        found[owner].add(int(optimizer.state[parameter].get("step", 0)))
    assert all(len(numbers) == 1 for numbers in found.values())
    return {name: numbers.pop() for name, numbers in found.items()}


def train(directory: Path | None, strategy: str, ckpt_path: Path | None = None, killed_in: int | None = None) -> Module:
    """Train this rank's half of each batch; ranks that share a model have the whole one."""
    rank, num_ranks = rank_of()
    rows = models.token_ids(4, 8, seed=1)
    own = rows if strategy == "megatron_lora" else rows.chunk(num_ranks)[rank]
    loaders = {"train_dataloaders": DataLoader(own, batch_size=4)}
    module, named = Module(killed_in), {"adapters": CONFIGS}
    fit(directory, module, strategy, lora=named, loaders=loaders, ckpt_path=ckpt_path, max_epochs=len(ACTING))
    return module


@on_ranks(2)
def train_on_ranks(directory: Path, strategy: str, killed_in: int | None = None) -> None:
    module = train(directory, strategy, killed_in=killed_in)
    save_peft(module.model, directory / "peft")


@pytest.fixture(scope="module")
def single(directory: Path) -> dict[str, Tensor]:
    """Return the adapters of a run on one process, whose files are in ``single``."""
    module = train(directory / "single", "auto")
    save_peft(module.model, directory / "single" / "peft")
    assert steps(module) == STEPS[6]
    return state(module)


@pytest.fixture(scope="module", params=STRATEGIES)
def files(directory: Path, request: pytest.FixtureRequest) -> Path:
    train_on_ranks(directory / request.param, request.param)
    return directory / request.param


@pytest.mark.usefixtures("single")
def test_the_file_of_two_ranks_is_that_of_one_process(directory: Path, files: Path) -> None:
    for epoch in (2, 5):
        one, other = (
            torch.load(path / f"epoch={epoch}.ckpt", weights_only=True) for path in (files, directory / "single")
        )
        assert list(one["state_dict"]) == list(other["state_dict"])
        torch.testing.assert_close(dict(one["state_dict"]), dict(other["state_dict"]), **STEP_TOLERANCE)
        moments, expected = (file["optimizer_states"][0]["state"] for file in (one, other))
        assert moments.keys() == expected.keys()
        for key, own in moments.items():
            assert own["step"] == expected[key]["step"]
            torch.testing.assert_close(own, expected[key], **STEP_TOLERANCE)
        sections = [file["lightning_lora"]["adapters"] for file in (one, other)]
        for own, whole in zip(*sections, strict=True):
            assert {key: own[key] for key in ("name", "config", "layers")} == {
                key: whole[key] for key in ("name", "config", "layers")
            }
            assert torch.equal(own["base"]["hashes"], whole["base"]["hashes"])
    for name in CONFIGS:
        there, here = (path / "peft" / name / "adapter_config.json" for path in (files, directory / "single"))
        assert there.read_bytes() == here.read_bytes()


@on_ranks(2)
def resume_on_ranks(path: Path, strategy: str, done: int, expected: dict[str, Tensor]) -> None:
    check_resumed(path, strategy, done, expected)


def check_resumed(path: Path, strategy: str, done: int, expected: dict[str, Tensor]) -> None:
    module = train(None, strategy, path)
    assert module.steps[0] == STEPS[done]
    assert steps(module) == STEPS[6]
    torch.testing.assert_close(state(module), expected, **STEP_TOLERANCE)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_file_of_one_process_resumes_on_ranks(directory: Path, single: dict[str, Tensor], strategy: str) -> None:
    resume_on_ranks(directory / "single" / "epoch=2.ckpt", strategy, 3, single)


def test_a_file_of_ranks_resumes_on_one_process(files: Path, single: dict[str, Tensor]) -> None:
    check_resumed(files / "epoch=2.ckpt", "auto", 3, single)


@pytest.mark.parametrize(("killed", "resumed"), [("fsdp_lora", "megatron_lora")])
def test_a_killed_run_goes_on_under_another_strategy(
    tmp_path: Path, single: dict[str, Tensor], killed: str, resumed: str
) -> None:
    with pytest.raises(AssertionError, match=r"failed with \[-9, -9\]"):
        train_on_ranks(tmp_path, killed, killed_in=3)
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == ["epoch=0.ckpt", "epoch=1.ckpt", "epoch=2.ckpt"]
    resume_on_ranks(tmp_path / "epoch=2.ckpt", resumed, 3, single)
