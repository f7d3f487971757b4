"""Refuse trainers, precisions and callbacks with which a LoRA run would not do what it promises."""

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, StochasticWeightAveraging, WeightAveraging
from torch import nn

from lightning_lora.compat.lightning import is_forking
from lightning_lora.model.families import find_root
from lightning_lora.model.state import injection_of

_REPLACING_PRECISIONS = ("BitsandbytesPrecision", "TransformerEnginePrecision")


def check_trainer(trainer: "pl.Trainer") -> None:
    """Raise ``TypeError`` for a Trainer of another package, ``ValueError`` for a precision that replaces layers."""
    if not isinstance(trainer, pl.Trainer):
        raise TypeError(
            f"the Trainer is {type(trainer).__module__}.{type(trainer).__qualname__}; lightning_lora works with the "
            "package lightning: write `import lightning.pytorch as pl` instead of `import pytorch_lightning as pl`"
        )
    precision = type(trainer.precision_plugin).__name__
    if precision in _REPLACING_PRECISIONS:
        raise ValueError(
            f"{precision} replaces the linear layers that adapters sit in and is not supported. Use "
            'precision="bf16-true" for a frozen base in half the memory, or "bf16-mixed"'
        )


def check_averaging(trainer: "pl.Trainer", lora_callback: Callback) -> None:
    """Raise ``ValueError`` for callbacks that copy the model where it is sharded, or before it is adapted."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector
    averaging = [one for one in callbacks if isinstance(one, (WeightAveraging, StochasticWeightAveraging))]
    if averaging and getattr(trainer.strategy, "shards", False):
        raise ValueError(
            f"{type(averaging[0]).__name__} copies the whole model, which no rank holds under "
            f"{type(trainer.strategy).__name__}: use it with strategy='ddp', or leave it out"
        )
    for callback in callbacks[: callbacks.index(lora_callback)] if lora_callback in callbacks else callbacks:
        if callback in averaging:
            name = type(callback).__name__
            raise ValueError(
                f"{name} copies the model at setup, before LoRACallback adapts it: list LoRACallback before {name}"
            )


def check_launcher(trainer: "pl.Trainer", pl_module: nn.Module, path: str | None) -> None:
    """Raise ``ValueError`` where fit runs in processes of its own, from which a bare model would come back bare."""
    if is_forking(trainer.strategy.launcher):
        _, root = find_root(pl_module, path)
        if injection_of(root) is None:
            raise ValueError(
                "this strategy runs fit in forked or spawned processes, and the model in this script's process would "
                "come back without adapters. Use strategy='ddp', or adapt it before fit with the callback's settings: "
                "inject(model, LoRAConfig(...))"
            )
