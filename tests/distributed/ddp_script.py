"""One rank of a DDP run: Trainer and Fabric on the same global batches that one process would see."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric import Fabric
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.distributed import get_rank, get_world_size
from torch.utils.data import DataLoader

from lightning_lora import LoRACallback, LoRAConfig, adapter_state_dict, inject, named_adapter_parameters
from tests import models
from tests.distributed.launch import report
from tests.graph import joint_functions
from tests.runs import ROWS, LanguageModule

BATCH = 4


class Recorded(LanguageModule):
    """Keeps the gradients of the first step, and which functions computed its loss."""

    def on_before_backward(self, loss: Tensor) -> None:
        if not hasattr(self, "functions"):
            self.functions = joint_functions(loss)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if not hasattr(self, "gradients"):
            self.gradients = {name: p.grad.clone() for name, p in named_adapter_parameters(self)}

    def configure_optimizers(self) -> Any:
        # a larger eps than usual: Adam would turn the rounding of a gradient near zero into a whole step
        return torch.optim.AdamW(self.parameters(), lr=1e-2, eps=1e-4)


def rank_loader(rank: int, num_ranks: int, epochs: int = 1) -> DataLoader:
    """Return this rank's rows of every global batch, so that a step sees what one process would see."""
    rows = models.token_ids(ROWS, 8, seed=1)
    mine = torch.cat([batch.chunk(num_ranks)[rank] for batch in rows.split(BATCH)])
    return DataLoader(mine, batch_size=BATCH // num_ranks)


def train(
    directory: Path | None, strategy: str, rank: int, num_ranks: int, **settings: Any
) -> tuple[pl.Trainer, Recorded]:
    """Train on this rank's rows, with a checkpoint per epoch in ``directory``, if there is one."""
    module = Recorded()
    ckpt_path, dropout = settings.pop("ckpt_path", None), settings.pop("dropout", 0.0)
    saving = [] if directory is None else [ModelCheckpoint(directory, save_top_k=-1, filename="{epoch}")]
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=num_ranks,
        strategy=strategy,
        use_distributed_sampler=False,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=bool(saving),
        default_root_dir=directory,
        callbacks=[LoRACallback(r=4, dropout=dropout), *saving],
        **{"max_epochs": 1, **settings},
    )
    trainer.fit(module, rank_loader(rank, num_ranks), ckpt_path=ckpt_path)
    return trainer, module


def fabric_losses(directory: Path, num_ranks: int) -> tuple[list[float], list[float]]:
    """Return the losses after a save, going on and resumed."""

    def start() -> tuple[Fabric, Any, Any]:
        fabric = Fabric(accelerator="cpu", devices=num_ranks, strategy="ddp")
        fabric.launch()
        model = inject(models.llama(), LoRAConfig(r=4))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        return fabric, *fabric.setup(model, optimizer)

    def steps(fabric: Fabric, model: Any, optimizer: Any) -> list[float]:
        losses = []
        for batch in rank_loader(fabric.global_rank, num_ranks):
            loss = model(input_ids=batch, labels=batch).loss
            fabric.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(fabric.all_reduce(loss.detach()).item())
        return losses

    fabric, model, optimizer = start()
    steps(fabric, model, optimizer)
    fabric.save(directory / "fabric.ckpt", {"model": model, "optimizer": optimizer})
    going_on = steps(fabric, model, optimizer)
    twin_fabric, twin, twin_optimizer = start()
    twin_fabric.load(directory / "fabric.ckpt", {"model": twin, "optimizer": twin_optimizer})
    return going_on, steps(twin_fabric, twin, twin_optimizer)


@contextmanager
def counted_all_reduces() -> Iterator[list[int]]:
    """Note the number of elements of every all-reduce of floating point numbers."""
    sizes: list[int] = []
    original = torch.distributed.all_reduce

    def counting(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if tensor.is_floating_point() and tensor.numel() > 1:
            sizes.append(tensor.numel())
        return original(tensor, *args, **kwargs)

    torch.distributed.all_reduce = counting
    try:
        yield sizes
    finally:
        torch.distributed.all_reduce = original


def main(directory: Path) -> None:
    num_ranks = int(os.environ["WORLD_SIZE"])
    rank = int(os.environ["RANK"])
    with counted_all_reduces() as sizes:
        _, module = train(directory / "ddp", "ddp", rank, num_ranks, max_epochs=2)
    assert (get_rank(), get_world_size()) == (rank, num_ranks)
    adapters = {name: value.clone() for name, value in adapter_state_dict(module).items()}
    ckpt_path = directory / "ddp" / "epoch=0.ckpt"
    _, resumed = train(None, "ddp", rank, num_ranks, max_epochs=2, ckpt_path=ckpt_path)
    ckpt_path = directory / "single" / "epoch=0.ckpt"
    _, from_one = train(None, "ddp", rank, num_ranks, max_epochs=2, ckpt_path=ckpt_path)
    pl.seed_everything(7, verbose=False)
    _, straight = train(directory / "dropout", "ddp", rank, num_ranks, max_epochs=2, dropout=0.2)
    pl.seed_everything(1234, verbose=False)
    after_one = directory / "dropout" / "epoch=0.ckpt"
    _, again = train(None, "ddp", rank, num_ranks, max_epochs=2, dropout=0.2, ckpt_path=after_one)
    accumulated, _ = train(None, "ddp", rank, num_ranks, accumulate_grad_batches=2, gradient_clip_val=0.05)
    going_on, back = fabric_losses(directory, num_ranks)
    report(
        directory,
        {
            "gradients": module.gradients,
            "adapters": adapters,
            "losses": module.losses,
            "resumed_losses": resumed.losses,
            "resumed": adapter_state_dict(resumed),
            "from_one": adapter_state_dict(from_one),
            "all_reduces": sizes,
            "dropout_losses": straight.losses,
            "dropout_resumed_losses": again.losses,
            "steps": accumulated.global_step,
            "fabric_going_on": going_on,
            "fabric_resumed": back,
        },
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
