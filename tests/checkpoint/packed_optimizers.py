"""Optimizers of bitsandbytes and torchao whose states are packed, and a module that is large enough for them to be."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_lora import LoRACallback

SIZE = 256  # times r=16 is the least that torchao packs
ROWS = 20


def optimizers() -> dict[str, Callable[[Any], torch.optim.Optimizer]]:
    """Return what makes each optimizer from parameters."""
    import bitsandbytes.optim as theirs
    import torchao.optim as torchaos

    return {
        "bitsandbytes AdamW8bit": lambda p: theirs.AdamW8bit(p, lr=1e-2, min_8bit_size=64),
        "bitsandbytes PagedAdamW8bit": lambda p: theirs.PagedAdamW8bit(p, lr=1e-2, min_8bit_size=64),
        "bitsandbytes Lion8bit": lambda p: theirs.Lion8bit(p, lr=1e-3, min_8bit_size=64),
        "torchao AdamW8bit": lambda p: torchaos.AdamW8bit(p, lr=1e-2, block_size=64),
        "torchao AdamW4bit": lambda p: torchaos.AdamW4bit(p, lr=1e-2, block_size=32),
        "torchao AdamWFp8": lambda p: torchaos.AdamWFp8(p, lr=1e-2, block_size=64),
        "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2),
    }


NAMES = (
    "bitsandbytes AdamW8bit",
    "bitsandbytes PagedAdamW8bit",
    "bitsandbytes Lion8bit",
    "torchao AdamW8bit",
    "torchao AdamW4bit",
    "torchao AdamWFp8",
)


class Net(pl.LightningModule):
    """Two linear layers, losses that are remembered, and one of the optimizers."""

    def __init__(self, name: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(SIZE, SIZE), nn.Tanh(), nn.Linear(SIZE, SIZE))
        self.name = name
        self.losses: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = (self.model(batch) - batch.roll(1, 1)).square().mean()
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return optimizers()[self.name]([p for p in self.parameters() if p.requires_grad])


def fit(directory: Path, name: str, steps: int, ckpt_path: Path | None = None, **settings: Any) -> Net:
    """Train for a number of steps, a multiple of the five of an epoch, and save ``<steps>.ckpt``."""
    rows = torch.randn(ROWS, SIZE, generator=torch.Generator().manual_seed(1))
    module = Net(name)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=directory,
        callbacks=[LoRACallback(r=16)],
        **{"devices": 1, **settings},
    )
    with torch.compiler.set_stance("force_eager"), warnings.catch_warnings():  # torchao compiles its steps
        warnings.filterwarnings("ignore", "Paged optimizers are not supported on CPU")
        trainer.fit(module, DataLoader(rows, batch_size=4), ckpt_path=ckpt_path)
    trainer.save_checkpoint(directory / f"{steps}.ckpt")
    return module


def packed_dtypes(module: Net) -> set[Any]:
    """Return in what the moments of the optimizer are packed: dtypes of codes, or classes of tensors."""
    state = module.optimizers(use_pl_optimizer=False).state
    values = [v for entry in state.values() for name, v in entry.items() if name in ("state1", "state2")]
    wrappers = [v for entry in state.values() for v in entry.values() if hasattr(v, "__tensor_flatten__")]
    return {value.dtype for value in values} | {type(value).__name__ for value in wrappers}
