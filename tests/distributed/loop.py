"""A training loop of one's own in Fabric, with all the random numbers that a file must bring back."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric import Fabric

from lightning_lora import LoRAConfig, inject
from tests import models
from tests.runs import loader


class Loop:
    """A loop with dropout in the base and in the adapters, and data in an order that is drawn."""

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
