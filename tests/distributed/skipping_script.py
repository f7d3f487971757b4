"""One rank that skips other layers than the other rank does, under plain DDP."""

import os
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_lora import LoRAConfig, adapter_state_dict, inject
from tests.distributed.counting import counted_collectives
from tests.distributed.fsdp_script import fit, state
from tests.distributed.launch import report

ROWS, SIZE = 4, 6
# by step and rank: a layer on one, others on each, the same on both, none, all but one
SKIPPED = [(set(), {1}), ({0}, {1, 2}), ({0}, {0}), (set(), set()), ({0, 1}, {0, 2})]


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


class Skipping(pl.LightningModule):
    """Takes the rows of some ranks, each with the layers that the rank skips."""

    def __init__(self, ranks: tuple[int, ...] = (0, 1)) -> None:
        super().__init__()
        self.model, self.ranks = tower(), ranks
        self.none: list[list[str]] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        step = int(batch[0])
        return loss_of(self.model, step, self.ranks)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        trained = [(name, p) for name, p in self.named_parameters() if p.requires_grad]
        self.none.append([name for name, p in trained if p.grad is None])

    def configure_optimizers(self) -> Any:
        # weight decay moves what has a gradient of zero, and leaves what has none
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.1, eps=1e-3, weight_decay=0.5)


def loss_of(model: Any, step: int, ranks: tuple[int, ...]) -> Tensor:
    losses = [model(rows()[step, rank], SKIPPED[step][rank]).square().mean() for rank in ranks]
    return torch.stack(losses).mean()


class Manual(Skipping):
    """Two optimizers in turn, each with the other's parameters frozen."""

    def __init__(self, ranks: tuple[int, ...] = (0, 1)) -> None:
        super().__init__(ranks)
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            self.toggle_optimizer(optimizer)
            self.manual_backward(loss_of(self.model, int(batch[0]), self.ranks))
            optimizer.step()
            optimizer.zero_grad()
            self.untoggle_optimizer(optimizer)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        pass

    def configure_optimizers(self) -> Any:
        named = [(name, p) for name, p in self.named_parameters() if p.requires_grad]
        factors = [[p for name, p in named if name.endswith(end)] for end in ("lora_A", "lora_B")]
        return [torch.optim.SGD(parameters, lr=0.5) for parameters in factors]


def run(directory: Path, module: Skipping, strategy: Any = "ddp", **settings: Any) -> Skipping:
    steps = DataLoader(torch.arange(len(SKIPPED)), batch_size=1)
    settings = {"max_epochs": 2, "lora": {"r": 2, "strict_idle": True}, **settings}
    fit(directory, module, strategy, loaders={"train_dataloaders": steps}, **settings)
    return module


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
    adapted = getattr(model, "module", model)
    return model, {name: value.clone() for name, value in adapter_state_dict(adapted).items()}


def in_fabric(rank: int) -> dict[str, Any]:
    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
    fabric.launch()
    model, adapters = by_hand((rank,), fabric)
    output = model(rows()[1, rank], SKIPPED[1][rank])
    fabric.backward(output.sum(), retain_graph=True)
    try:
        fabric.backward(output.square().sum())
        error = "none"
    except ValueError as refused:
        error = str(refused)
    return {"adapters": adapters, "twice": error}


def main(directory: Path) -> None:
    rank = int(os.environ["RANK"])
    module = Skipping((rank,))
    with counted_collectives() as traffic:
        run(directory / "ddp", module)
    found = {"adapters": state(module), "none": module.none, "all_reduces": traffic["all_reduce"]}
    found["accumulated"] = state(run(directory / "two", Skipping((rank,)), accumulate_grad_batches=2))
    found["manual"] = state(run(directory / "manual", Manual((rank,))))
    found["fabric"] = in_fabric(rank)
    try:
        run(directory / "fsdp", Skipping((rank,)), "fsdp_lora")
        found["fsdp"] = "none"
    except ValueError as error:
        found["fsdp"] = str(error)
    report(directory, found)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
