"""Layers that ranks skip, each its own, under plain DDP on two gloo ranks against one process with both ranks' rows."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_lora import LoRAConfig, adapter_state_dict, inject
from tests.distributed.counting import counted_collectives
from tests.distributed.ranks import on_ranks
from tests.distributed.training import fit, rank_of, state

ROWS, SIZE = 4, 6
# by step and rank: a layer on one, others on each, the same on both, none, all but one
SKIPPED = [(set(), {1}), ({0}, {1, 2}), ({0}, {0}), (set(), set()), ({0, 1}, {0, 2})]
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}  # other order of sums
TENSORS, ELEMENTS = 6, 3 * 2 * 2 * SIZE  # three layers, two factors of rank 2
BOTH = (0, 1)


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(SIZE, SIZE) for _ in range(3))
        self.layerdrop = 0.5

    def forward(self, x: Tensor, skipped: set[int]) -> Tensor:
        for index, layer in enumerate(self.layers):
            if index not in skipped:
                x = x + layer(x).tanh()
        return x


def tower() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Tower()


def rows() -> Tensor:
    return torch.randn(len(SKIPPED), 2, ROWS, SIZE, generator=torch.Generator().manual_seed(1))  # step, rank, ...


def loss_of(model: Any, step: int, ranks: tuple[int, ...]) -> Tensor:
    losses = [model(rows()[step, rank], SKIPPED[step][rank]).square().mean() for rank in ranks]
    return torch.stack(losses).mean()


class Skipping(pl.LightningModule):
    """Takes the rows of some ranks, each with the layers that the rank skips."""

    def __init__(self, ranks: tuple[int, ...]) -> None:
        super().__init__()
        self.model, self.ranks = tower(), ranks
        self.without_gradient: list[list[str]] = []  # by step

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return loss_of(self.model, int(batch[0]), self.ranks)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        trained = [(name, p) for name, p in self.named_parameters() if p.requires_grad]
        self.without_gradient.append([name for name, p in trained if p.grad is None])

    def configure_optimizers(self) -> Any:
        # weight decay moves what has a gradient of zero, and leaves what has none
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.1, eps=1e-3, weight_decay=0.5)


class Manual(Skipping):
    """Two optimizers in turn, each with the other's parameters frozen."""

    def __init__(self, ranks: tuple[int, ...]) -> None:
        super().__init__(ranks)
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            self.toggle_optimizer(optimizer)
            self.manual_backward(loss_of(self.model, int(batch[0]), self.ranks))
            optimizer.step()
            optimizer.zero_grad()
            self.untoggle_optimizer(optimizer)

    def configure_optimizers(self) -> Any:
        named = [(name, p) for name, p in self.named_parameters() if p.requires_grad]
        factors = [[p for name, p in named if name.endswith(end)] for end in ("lora_A", "lora_B")]
        return [torch.optim.SGD(parameters, lr=0.5) for parameters in factors]


def run(directory: Path, module: Skipping, strategy: Any = "ddp", **settings: Any) -> Skipping:
    steps = DataLoader(torch.arange(len(SKIPPED)), batch_size=1)
    settings = {"max_epochs": 2, "lora": {"r": 2, "strict_idle": True}, **settings}
    fit(directory, module, strategy, loaders={"train_dataloaders": steps}, **settings)
    return module


def alone(directory: Path, build: Any = Skipping, **settings: Any) -> dict[str, Any]:
    module = run(directory, build(BOTH), "auto", **settings)
    return {"adapters": state(module), "without gradient": module.without_gradient}


@pytest.fixture(scope="module")
def single(directory: Path) -> dict[str, Any]:
    return alone(directory)


@on_ranks(2)
def test_every_step_equals_one_process_and_reduces_all_gradients_at_once(
    tmp_path: Path, single: dict[str, Any]
) -> None:
    module = Skipping((rank_of()[0],))
    with counted_collectives() as traffic:
        run(tmp_path, module)
    torch.testing.assert_close(state(module), single["adapters"], **TOLERANCE)
    assert [size for size in traffic["all_reduce"] if size > 1] == [TENSORS + ELEMENTS] * 2 * len(SKIPPED)
    # what no rank used has no gradient
    assert any(single["without gradient"])
    assert module.without_gradient == single["without gradient"]


ACCUMULATED = {"accumulate_grad_batches": 2}


@pytest.fixture(scope="module")
def single_accumulated(directory: Path) -> dict[str, Any]:
    return alone(directory / "accumulated", **ACCUMULATED)


@on_ranks(2)
def test_accumulation_equals_one_process(tmp_path: Path, single_accumulated: dict[str, Any]) -> None:
    module = run(tmp_path, Skipping((rank_of()[0],)), **ACCUMULATED)
    torch.testing.assert_close(state(module), single_accumulated["adapters"], **TOLERANCE)


@pytest.fixture(scope="module")
def single_in_turns(directory: Path) -> dict[str, Any]:
    return alone(directory / "turns", Manual)


@on_ranks(2)
def test_turns_of_optimizers_equal_one_process(tmp_path: Path, single_in_turns: dict[str, Any]) -> None:
    module = run(tmp_path, Manual((rank_of()[0],)))
    torch.testing.assert_close(state(module), single_in_turns["adapters"], **TOLERANCE)


def by_hand(ranks: tuple[int, ...], fabric: Any = None) -> tuple[Any, dict[str, Tensor]]:
    """Take the same steps in a loop of one's own, in Fabric or in one process; return the model and its adapters."""
    model = inject(tower(), LoRAConfig(r=2))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer: Any = torch.optim.AdamW(trained, lr=0.1, eps=1e-3, weight_decay=0.5)
    if fabric is not None:
        model, optimizer = fabric.setup(model, optimizer)
    for step in [*range(len(SKIPPED))] * 2:
        loss = loss_of(model, step, ranks)
        loss.backward() if fabric is None else fabric.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    return model, {n: v.clone() for n, v in adapter_state_dict(getattr(model, "module", model)).items()}


@on_ranks(2)
def test_fabric_equals_one_process_and_refuses_a_second_backward_of_one_forward() -> None:
    fabric, rank = Fabric(accelerator="cpu", devices=2, strategy="ddp"), rank_of()[0]
    fabric.launch()
    model, adapters = by_hand((rank,), fabric)
    torch.testing.assert_close(adapters, by_hand(BOTH)[1], **TOLERANCE)
    output = model(rows()[1, rank], SKIPPED[1][rank])
    fabric.backward(output.sum(), retain_graph=True)
    with pytest.raises(ValueError, match="two backwards came after one forward"):
        fabric.backward(output.square().sum())


@on_ranks(2)
def test_layerdrop_is_refused_where_ranks_gather_what_others_skip(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"layerdrop=0\.5") as refused:
        run(tmp_path, Skipping((rank_of()[0],)), "fsdp_lora")
    assert "'ddp'" in str(refused.value)
