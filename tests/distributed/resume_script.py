"""One rank of runs that a file must bring back whole: a teacher that moves, and the random state of a Fabric loop."""

import os
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from lightning_lora import LoRACallback
from lightning_lora.fingerprint import exact_hashes
from tests import models
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
    module = Follower()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=num_ranks,
        strategy=strategy,
        max_epochs=epochs,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[LoRACallback(r=2, module="model"), ModelCheckpoint(directory, save_last=True, save_top_k=0)],
    )
    trainer.fit(module, loader(), ckpt_path=ckpt_path)
    return {name: parameter.detach() for name, parameter in module.teacher.named_parameters()}


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
    found["hashes"] = hashes_of_shards(num_ranks)
    report(directory, found)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
