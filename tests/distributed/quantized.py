"""Quantised models on ranks: what they are built from, and what a run shows of them.

Every rank is given the same rows. So the mean of their gradients is that of one process, bit for bit.
"""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from torch import Tensor, nn

from lightning_lora.layers.quantized import QuantizedModule
from lightning_lora.model.names import clean_name
from lightning_lora.model.quantize import quantize
from lightning_lora.ops.sharded import whole
from tests import models
from tests.distributed.training import Recorded, fit, optimizer_state, rank_loader, state

KINDS = ("nf4", "nf4-dq", "int8")
THREE_STEPS: dict[str, Any] = {"limit_train_batches": 3}


class Quantized(Recorded):
    """Trains over a quantised base, and keeps the packed bytes that its last forward saw."""

    def __init__(self, kind: Any, exclude: list[str] | None = None) -> None:
        super().__init__()
        self.model = self.build()
        quantize(self.model, kind, exclude=exclude)
        self.seen: dict[str, Tensor] = {}
        for name, layer in quantized_layers(self.model).items():
            layer.register_forward_pre_hook(lambda layer, _, name=name: self.look(name, layer))

    def build(self) -> nn.Module:
        return models.llama()

    def look(self, name: str, layer: Any) -> None:
        self.seen |= {key: tensor.clone() for key, tensor in parts_of(name, layer).items()}


def quantized_layers(model: nn.Module) -> dict[str, Any]:
    return {clean_name(name): module for name, module in model.named_modules() if isinstance(module, QuantizedModule)}


def parts_of(name: str, layer: Any) -> dict[str, Tensor]:
    """Return the parts of a layer's packed weights; those of ``weight`` have the name of the layer."""
    return {
        f"{name}.{part}" if local == "weight" else f"{name}.{local}.{part}": tensor
        for local in layer.quantized
        for part, tensor in layer.stored(local).tensors.items()
    }


def packed_bytes(model: nn.Module) -> dict[str, Tensor]:
    """Return the parts of every packed weight, whole. Called on all ranks."""
    return {
        key: whole(tensor).detach().clone()
        for name, layer in quantized_layers(model).items()
        for key, tensor in parts_of(name, layer).items()
    }


def train(module: Any, strategy: Any = "auto", **settings: Any) -> dict[str, Any]:
    """Train for three steps with the same rows on every rank; return what there is to see of it."""
    loaders = {"train_dataloaders": rank_loader(0, 1)}
    fit(None, module, strategy, loaders=loaders, **THREE_STEPS, **settings)
    return {
        "gradients": module.gradients,
        "adapters": state(module),
        "losses": module.losses,
        "stored": packed_bytes(module.model),
        "seen": module.seen,
    }


class AtStart(pl.Callback):
    """Keeps step, adapters and moments as a file brought them back."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.step = trainer.global_step
        self.adapters, self.moments = state(pl_module), optimizer_state(pl_module)


def train_epochs(
    directory: Path,
    module: Any,
    strategy: Any,
    ckpt_path: Path | None,
    epochs: int,
    more_callbacks: tuple[pl.Callback, ...] = (),
    **settings: Any,
) -> dict[str, Any]:
    """Train up to a number of epochs, from a file if there is one, with the same rows on every rank.

    Returns:
        The step at the start, adapters and moments before and after, and the losses.
    """
    at_start = AtStart()
    loaders = {"train_dataloaders": rank_loader(0, 1)}
    settings = {"callbacks": (at_start, *more_callbacks), "loaders": loaders, "max_epochs": epochs, **settings}
    fit(directory, module, strategy, ckpt_path=ckpt_path, **settings)
    before = (at_start.adapters, at_start.moments)
    after = (state(module), optimizer_state(module))
    return {"step": at_start.step, "before": before, "after": after, "losses": module.losses}
