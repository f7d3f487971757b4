"""One rank of runs that a file must bring back whole: a teacher that moves, and the random state of a Fabric loop."""

import os
import random
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.fabric import Fabric
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from lightning_lora import LoRACallback, LoRAConfig, inject
from lightning_lora.checkpoint.fingerprint import exact_hashes
from tests import models, runs
from tests.distributed.launch import report
from tests.runs import LanguageModule, loader

MOVES = "teacher.model.layers.0.mlp.up_proj.weight"


class Follower(LanguageModule):
    """One weight of a frozen teacher moves by a millionth in the first step, and then no more."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = models.llama().requires_grad_(False)

    def on_train_batch_end(self, outputs: Any, batch: Tensor, batch_idx: int) -> None:
        if self.global_step == 1:
            self.get_parameter(MOVES).data.mul_(1 + 1e-6)


def fit_follower(
    directory: Path, strategy: str, num_ranks: int, epochs: int, ckpt_path: Path | None = None
) -> dict[str, Tensor]:
    """Train with ``last.ckpt`` in ``directory``; return the whole teacher."""
    module, saving = Follower(), ModelCheckpoint(directory, save_last=True, save_top_k=0)
    trainer = runs.trainer(
        directory, LoRACallback(r=2, module="model"), saving, max_epochs=epochs, strategy=strategy, devices=num_ranks
    )
    trainer.fit(module, loader(), ckpt_path=ckpt_path)
    return {name: parameter.detach() for name, parameter in module.teacher.named_parameters()}


def losses_around_an_end(directory: Path, strategy: str, num_ranks: int) -> dict[str, list[float]]:
    """Return the losses of three epochs in one go, and of two runs of which the first ends with an epoch."""

    def fit(ckpt_path: Path | None = None, **settings: Any) -> tuple[pl.Trainer, list[float]]:
        pl.seed_everything(7, verbose=False)  # also of DistributedSampler's order
        torch.manual_seed(7 if ckpt_path is None else 98)
        module = LanguageModule(dropout=0.1)
        trainer = runs.trainer(
            directory, LoRACallback(r=2, dropout=0.2), strategy=strategy, devices=num_ranks, **{**limits, **settings}
        )
        trainer.fit(module, loader(shuffle=True), ckpt_path=ckpt_path)
        return trainer, module.losses

    limits = {"max_epochs": -1, "max_steps": 3 * 4 // num_ranks}
    path = directory / f"{strategy}_end.ckpt"
    _, straight = fit()
    trainer, first = fit(max_steps=2 * 4 // num_ranks)
    trainer.save_checkpoint(path)
    return {"straight": straight, "parts": first + fit(path)[1]}


def refusal_of_nan(directory: Path, strategy: str, num_ranks: int) -> str:
    """Return the error of a save after an adapter became NaN on every rank."""

    class Diverging(LanguageModule):
        def on_train_end(self) -> None:
            self.model.get_parameter("model.layers.1.mlp.up_proj.lora_B").data.fill_(torch.nan)

    trainer = runs.trainer(
        directory, LoRACallback(r=2, on_nonfinite="error"), max_epochs=1, strategy=strategy, devices=num_ranks
    )
    trainer.fit(Diverging(), loader())
    try:
        trainer.save_checkpoint(directory / f"{strategy}_nan.ckpt")
    except ValueError as error:
        return str(error)
    return "none"


class Loop:
    """A loop of one's own, with dropout in the base and in the adapters, and data in an order that is drawn."""

    def __init__(self, strategy: str, num_ranks: int, seed: int) -> None:
        self.fabric = Fabric(accelerator="cpu", devices=num_ranks, strategy=strategy)
        self.fabric.launch()
        self.fabric.seed_everything(seed + self.fabric.global_rank, verbose=False)
        model = inject(models.llama(dropout=0.1), LoRAConfig(r=2, dropout=0.2)).train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        self.model, self.optimizer = self.fabric.setup(model, optimizer)

    @property
    def state(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.optimizer, "numbers": None}

    def epoch(self) -> list[Any]:
        """Train on this rank's own shuffled rows; return the losses, and numbers of the other generators."""
        losses = []
        for batch in loader(shuffle=True):
            loss = self.model(input_ids=batch, labels=batch).loss
            self.fabric.backward(loss)
            self.optimizer.step()
            self.optimizer.zero_grad()
            losses.append(loss.item())
        return [*losses, random.random(), float(np.random.rand())]


def epochs_of_loop(directory: Path, strategy: str, num_ranks: int) -> dict[str, list[Any]]:
    """Return the second epoch of a loop that went on, and of one that was loaded."""
    first = Loop(strategy, num_ranks, 7)
    first.epoch()
    first.fabric.save(directory / f"{strategy}.ckpt", first.state)
    straight = first.epoch()
    second = Loop(strategy, num_ranks, 98)
    second.fabric.load(directory / f"{strategy}.ckpt", second.state)
    return {"straight": straight, "resumed": second.epoch()}


def hashes_of_shards(num_ranks: int) -> list[int]:
    """Return the hashes of a sharded tensor: as it is, with a bit of the last rank changed, and with parts swapped."""
    mesh = init_device_mesh("cpu", (num_ranks,))
    values = torch.arange(8.0).view(4, 2)
    parts = [distribute_tensor(values, mesh, [Shard(0)]) for _ in range(2)] + [
        distribute_tensor(values.roll(2, 0), mesh, [Shard(0)])
    ]
    if torch.distributed.get_rank() == num_ranks - 1:
        parts[1].to_local().view(torch.int32)[-1, -1] ^= 1
    return [exact_hashes({"part": part})["part"] for part in parts]


def main(directory: Path) -> None:
    num_ranks = int(os.environ["WORLD_SIZE"])
    found: dict[str, Any] = {}
    for strategy in ("ddp", "fsdp_lora"):
        teacher = fit_follower(directory / strategy, strategy, num_ranks, 1)
        resumed = fit_follower(directory / f"{strategy}2", strategy, num_ranks, 2, directory / strategy / "last.ckpt")
        found[strategy] = {"teacher": teacher, "resumed": resumed}
    for strategy in ("ddp", "fsdp_lora"):
        found[strategy]["end"] = losses_around_an_end(directory, strategy, num_ranks)
        found[strategy]["nan"] = refusal_of_nan(directory, strategy, num_ranks)
    found["loops"] = {one: epochs_of_loop(directory, one, num_ranks) for one in ("ddp", "fsdp_lora")}
    found["hashes"] = hashes_of_shards(num_ranks)
    report(directory, found)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
