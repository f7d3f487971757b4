"""Gradients that a user reads or changes between backward and step, on two gloo ranks against one process."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch.utilities import grad_norm
from torch import Tensor, nn

from lightning_lora import FSDPLoRAStrategy, LoRAConfig, MegatronLoRAStrategy, inject
from lightning_lora.distributed.gradient_norm import total_norm
from lightning_lora.fabric import MegatronLoRAStrategy as FabricStrategy
from tests import models
from tests.distributed.ranks import on_ranks
from tests.distributed.training import STEP_TOLERANCE, error_of, fit, rank_loader, rank_of, state
from tests.runs import LanguageModule


def trained(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


class Reader(LanguageModule):
    """Does something to gradients before a step of SGD, which unlike Adam shows their scale."""

    read: Callable[[nn.Module], Any]

    @classmethod
    def doing(cls, read: Callable[[nn.Module], Any]) -> Any:
        module = cls()  # its arguments would be hyperparameters
        module.read, module.found = read, []
        return module

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.found.append(self.read(self))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(trained(self), lr=1.0, momentum=0.9)


def run(module: Reader, strategy: Any = "megatron_lora", directory: Path | None = None, **settings: Any) -> Reader:
    rank, num_ranks = rank_of()
    shared = strategy == "megatron_lora"  # ranks that share a model see the same batches
    data = rank_loader(0, 1) if shared else rank_loader(rank, num_ranks)
    built = MegatronLoRAStrategy(tensor_parallel_size=2) if shared else strategy
    fit(directory, module, built, loaders={"train_dataloaders": data}, **settings)
    return module


def assert_names_the_remedy(error: str) -> None:
    assert "split over tensor-parallel ranks" in error
    assert "self.clip_gradients" in error
    assert "fabric.clip_gradients" in error


MAX_NORM = 0.05
ONE_STEP = {"limit_train_batches": 1}


def clipped(module: nn.Module) -> Any:
    return nn.utils.clip_grad_norm_(trained(module), MAX_NORM)


def by_hand(module: nn.Module) -> Any:
    return sum(p.grad.pow(2).sum() for p in trained(module)) ** 0.5


READINGS: dict[str, Callable[[nn.Module], Any]] = {
    "clip_grad_norm_": clipped,
    "not foreach": lambda module: nn.utils.clip_grad_norm_(trained(module), MAX_NORM, foreach=False),
    "get_total_norm": lambda module: nn.utils.get_total_norm([p.grad for p in trained(module)]),
    "grad_norm": lambda module: grad_norm(module, 2),
    "by hand": by_hand,
    "flat": lambda module: torch.cat([p.grad.flatten() for p in trained(module)]).norm(),
    "numpy": lambda module: [p.grad.detach().numpy() for p in trained(module)],
    "finite": lambda module: all(torch.isfinite(p.grad).all() for p in trained(module)),
}


class Late(Reader):
    """Reads after the step."""

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        pass

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.found.append(self.read(self))


@on_ranks(2)
def test_what_reads_a_part_as_if_it_were_whole_is_refused_with_the_remedy() -> None:
    for read in READINGS.values():
        assert_names_the_remedy(error_of(run, Reader.doing(read), **ONE_STEP))
    assert_names_the_remedy(error_of(run, Late.doing(by_hand), **ONE_STEP))
    assert_names_the_remedy(error_of(run, Reader.doing(by_hand), limit_train_batches=2, accumulate_grad_batches=2))


@on_ranks(2)
def test_what_reads_a_part_in_fabric_is_refused_with_the_remedy() -> None:
    fabric = Fabric(accelerator="cpu", devices=2, strategy=FabricStrategy(tensor_parallel_size=2))
    fabric.launch()
    model = inject(models.llama(), LoRAConfig(r=4))
    model, _ = fabric.setup(model, torch.optim.SGD(trained(model), lr=1.0))
    batch = models.token_ids(2, 8, seed=1)
    fabric.backward(model(input_ids=batch, labels=batch).loss)
    assert_names_the_remedy(error_of(clipped, model))


@on_ranks(2)
def test_torchs_error_about_gradients_in_shards_beside_whole_ones_names_the_remedy() -> None:
    strategy = FSDPLoRAStrategy(shard_adapters=True, min_shard_numel=1000)
    beside = {"lora": {"modules_to_save": ["norm"]}}  # a norm stays whole beside adapters in shards
    error = error_of(run, Reader.doing(clipped), strategy, **beside, **ONE_STEP)
    assert "mixed torch.Tensor and DTensor" in error
    assert "clip with Trainer(gradient_clip_val=...)" in error


class Manual(Reader):
    """Runs backward past the strategy."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        self.model(input_ids=batch, labels=batch).loss.backward()
        self.read(self)
        optimizer.step()
        optimizer.zero_grad()


strategies = pytest.mark.parametrize("strategy", ["megatron_lora", "fsdp_lora"])


@strategies
@on_ranks(2)
def test_what_reads_a_gradient_before_it_is_averaged_is_refused(strategy: str) -> None:
    error = error_of(run, Manual.doing(by_hand), strategy, **ONE_STEP)
    # with one data-parallel rank, parts are averaged over nobody
    assert "before it was averaged" in error or (strategy == "megatron_lora" and "split over" in error)
    assert "self.clip_gradients" in error


def scaled_by_rank(after: int) -> Callable[[Any], None]:
    """Scale gradients from some step on as a norm of a part would: by another number on every rank."""

    def scale(module: Any) -> None:
        if module.trainer.global_step >= after:
            for parameter in trained(module):
                parameter.grad.mul_(1.0 + 0.02 * module.trainer.global_rank)

    return scale


@strategies
@pytest.mark.parametrize("first", [0, 7], ids=["at once", "in the last step before a save"])
@on_ranks(2)
def test_adapters_that_drift_apart_are_found_at_the_first_steps_and_at_every_save(
    tmp_path: Path, strategy: str, first: int
) -> None:
    error = error_of(run, Reader.doing(scaled_by_rank(after=first)), strategy, tmp_path, max_epochs=2)
    assert "the ranks train different adapters" in error
    assert "lora_" in error
    assert "self.clip_gradients" in error


def clamped(module: nn.Module) -> None:
    nn.utils.clip_grad_value_(trained(module), 1e-3)


def norm(module: nn.Module) -> float:
    return float(nn.utils.get_total_norm([p.grad for p in trained(module)]))


@pytest.fixture(scope="module")
def single() -> dict[str, Any]:
    """Return what one process ends with after each reading."""
    by_clamping, by_clipping = (state(run(Reader.doing(read), "auto")) for read in (clamped, clipped))
    return {"clamped": by_clamping, "clipped": by_clipping, "norms": run(Reader.doing(norm), "auto").found}


@on_ranks(2)
def test_clamping_every_entry_equals_one_process(single: dict[str, Any]) -> None:
    torch.testing.assert_close(state(run(Reader.doing(clamped))), single["clamped"], **STEP_TOLERANCE)


@on_ranks(2)
def test_torchs_clipping_is_served_where_each_rank_has_all_of_every_tensor(single: dict[str, Any]) -> None:
    module = run(Reader.doing(clipped), MegatronLoRAStrategy(tensor_parallel_size=1))
    torch.testing.assert_close(state(module), single["clipped"], **STEP_TOLERANCE)


@on_ranks(2)
def test_the_norm_of_the_whole_equals_one_process(single: dict[str, Any]) -> None:
    norms = run(Reader.doing(lambda module: float(total_norm(module.parameters())))).found
    torch.testing.assert_close(norms, single["norms"], rtol=1e-4, atol=0)
