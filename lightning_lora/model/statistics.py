"""Freeze the running statistics of a frozen base's batch normalisations, in training too."""

from collections.abc import Sequence
from typing import ClassVar, Self

from torch import nn
from typing_extensions import override

from lightning_lora.compat.torch import batch_norm_class
from lightning_lora.layers.class_swap import SwappedModule, restore_class, swap_class
from lightning_lora.model.names import clean_name


class FrozenStatistics(SwappedModule):
    """Mixin for a batch normalisation that stays in eval mode: it uses its running statistics and never updates them.

    The network then trains as it is evaluated, and the base is what it was when the adapters are loaded elsewhere.
    """

    class_prefix: ClassVar[str] = "Frozen"
    lora_was_training: bool

    @override
    def train(self, mode: bool = True) -> Self:
        self.lora_was_training = mode  # the mode that it is given when it thaws
        return super().train(False)


def freeze_statistics(model: nn.Module, trained_whole: Sequence[str]) -> None:
    """Freeze the statistics of every batch normalisation in ``model`` but those inside modules that train whole."""
    for name, module in model.named_modules():
        clean = clean_name(name)
        inside = any(clean == whole or clean.startswith(f"{whole}.") for whole in trained_whole)
        if inside or isinstance(module, FrozenStatistics):
            continue
        if isinstance(module, batch_norm_class()) and module.running_mean is not None:
            swap_class(module, FrozenStatistics)
            module.train(module.training)


def unfreeze_statistics(model: nn.Module) -> None:
    """Undo :func:`freeze_statistics`."""
    for module in model.modules():
        if isinstance(module, FrozenStatistics):
            was_training = module.lora_was_training
            restore_class(module, "lora_was_training")
            module.train(was_training)
