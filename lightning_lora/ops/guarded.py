"""Raise an error where code reads a number out of a gradient that differs between ranks.

A gradient is guarded by its class, which is swapped in place: it stays the same object in the same memory, so that
autograd adds to it and nothing is copied. Operations that work entry by entry (scale, clamp, unscale) run, and their
result is guarded too. Operations that reduce the gradient, or return Python values, would have another result on every
rank, and raise.
"""

import copy
from collections.abc import Iterable
from typing import Any, SupportsIndex

from torch import Tensor
from typing_extensions import override

from lightning_lora.compat.torch import plain_tensors, tree_leaves

_VALUES = {"item", "tolist", "numpy", "__array__", "__float__", "__int__", "__bool__", "equal", "allclose"}


class GuardedGradient(Tensor):
    """A gradient that must not be read as if it were whole.

    Attributes:
        is_what: completes "the gradient of a parameter ..." in the error.
        remedy: what to do instead.
    """

    is_what: str
    remedy: str

    @classmethod
    @override
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in _VALUES:
            raise ValueError(cls._error(name))
        with plain_tensors():
            result = func(*args, **(kwargs or {}))
            made = [value for value in tree_leaves(result) if isinstance(value, Tensor)]
            if made:
                given = tree_leaves((args, kwargs))
                smallest = min((value.numel() for value in given if isinstance(value, GuardedGradient)), default=0)
                if any(value.numel() < smallest for value in made):
                    raise ValueError(cls._error(name))
        for value in made:
            if type(value) is Tensor:
                value.__class__ = cls
        return result

    @classmethod
    def _error(cls, name: str) -> str:
        return f"{name or 'this function'} was given the gradient of a parameter {cls.is_what}. {cls.remedy}"

    @override
    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return copy.deepcopy(bare(self), memo)

    @override
    def __reduce_ex__(self, proto: SupportsIndex) -> Any:
        return bare(self).__reduce_ex__(proto)


class PartOfGradient(GuardedGradient):
    """This rank's part of the gradient of a tensor that tensor parallelism split."""

    is_what = "that is split over tensor-parallel ranks: each rank has a part of it, and would compute another result"
    remedy = (
        "To clip, set Trainer(gradient_clip_val=...), or call self.clip_gradients(optimizer, gradient_clip_val=...) or "
        "fabric.clip_gradients(model, optimizer, max_norm=...). For the norm of the whole, call "
        "lightning_lora.distributed.gradient_norm.total_norm(parameters) on all ranks"
    )


class UnreducedGradient(GuardedGradient):
    """This rank's own gradient, not yet averaged, from a backward that the strategy did not run."""

    is_what = "before it was averaged over the ranks: each rank has its own, and would compute another result"
    remedy = (
        "Run backward with self.manual_backward(loss) or fabric.backward(loss), which average; or clip with "
        "self.clip_gradients(optimizer, gradient_clip_val=...) or fabric.clip_gradients(model, optimizer, max_norm=...)"
    )


def bare(gradient: Tensor) -> Tensor:
    """Return a gradient without its guard, in the same memory."""
    if not isinstance(gradient, GuardedGradient):
        return gradient
    with plain_tensors():
        return gradient.detach()


def guard(parameters: Iterable[Tensor], kind: type[Tensor]) -> None:
    """Change the class of the parameters' gradients in place; ``Tensor`` lifts the guard."""
    for parameter in parameters:
        gradient = parameter.grad
        if gradient is None or type(gradient) is kind:
            continue
        if type(gradient) is Tensor or isinstance(gradient, GuardedGradient):  # no DTensor
            gradient.__class__ = kind
