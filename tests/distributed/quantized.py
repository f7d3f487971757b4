"""Quantised models on ranks: what they are built from, and what a run shows of them.

Every rank is given the same rows. So the mean of their gradients is that of one process, bit for bit.
"""

from typing import Any

from torch import Tensor, nn

from lightning_lora.layers.quantized import QuantizedModule
from lightning_lora.model.names import clean_name
from lightning_lora.model.quantize import quantize
from lightning_lora.ops.sharded import whole
from tests import models
from tests.distributed.training import Recorded, fit, rank_loader, state

KINDS = ("nf4", "nf4-dq", "int8")
THREE_STEPS: dict[str, Any] = {"limit_train_batches": 3}


class Quantized(Recorded):
    """Trains over a quantised base, and keeps the packed bytes that its last forward saw."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.model = self.build()
        quantize(self.model, kind)
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
