"""Batch normalisation of a frozen base: its running statistics stay put, in training too."""

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from typing_extensions import Self, override

from lightning_lora.root import clean_name


class FrozenStatistics(nn.Module):
    """Mixin for a batch normalisation that stays in eval mode: it uses its running statistics and never updates them.

    The network then trains as it is evaluated, and the base is what it was when the adapters are loaded elsewhere.
    """

    frozen_base_class: ClassVar[type[nn.Module]]
    lora_was_training: bool

    @override
    def train(self, mode: bool = True) -> Self:
        self.lora_was_training = mode  # the mode that it is given when it thaws
        return super().train(False)

    @override
    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(max(protocol, 2))
        _, arguments, *state = reduced
        return (_new_frozen, (self.frozen_base_class, *arguments[1:]), *state)


def freeze_statistics(model: nn.Module, trained_whole: Sequence[str]) -> None:
    """Freeze the statistics of every batch normalisation in ``model`` but those inside modules that train whole."""
    for name, module in model.named_modules():
        clean = clean_name(name)
        inside = any(clean == whole or clean.startswith(f"{whole}.") for whole in trained_whole)
        if inside or isinstance(module, FrozenStatistics):
            continue
        if isinstance(module, _BatchNorm) and module.running_mean is not None:
            module.__class__ = _frozen_class(type(module))  # type: ignore[assignment]  # the class swap
            module.train(module.training)


def unfreeze_statistics(model: nn.Module) -> None:
    """Undo :func:`freeze_statistics`."""
    for module in model.modules():
        if isinstance(module, FrozenStatistics):
            was_training = bool(module.__dict__.pop("lora_was_training"))
            module.__class__ = module.frozen_base_class  # type: ignore[assignment]
            module.train(was_training)


_MADE_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


def _frozen_class(base: type[nn.Module]) -> type[nn.Module]:
    if base not in _MADE_CLASSES:
        namespace = {"__module__": base.__module__, "__doc__": base.__doc__, "frozen_base_class": base}
        _MADE_CLASSES[base] = type(f"Frozen{base.__name__}", (FrozenStatistics, base), namespace)
    return _MADE_CLASSES[base]


def _new_frozen(base: type[nn.Module], *arguments: object) -> nn.Module:
    cls = _frozen_class(base)
    return cls.__new__(cls, *arguments)
