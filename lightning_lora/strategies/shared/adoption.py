"""Swap a stock strategy's class in place, so that it saves and loads adapter-only checkpoints."""

import functools
from typing import Any

from lightning_lora.checkpoint.atomic_io import make_atomic
from lightning_lora.distributed.ddp import prepare_ddp


def swap_class(strategy: Any, mixin: Any, ddp: type[Any]) -> None:
    """Give ``strategy`` the class ``LoRA<Class>(mixin, <Class>)``, once.

    Args:
        ddp: Trainer's or Fabric's strategy for DDP, whose reducer is set up otherwise.
    """
    make_atomic(strategy.checkpoint_io)
    if not isinstance(strategy, mixin):
        if isinstance(strategy, ddp):
            prepare_ddp(strategy)
        base: Any = type(strategy)
        strategy.__class__ = _with_mixin(mixin, base)


@functools.cache
def _with_mixin(mixin: type[Any], base: type[Any]) -> type[Any]:
    return type(f"LoRA{base.__name__}", (mixin, base), {"__module__": base.__module__, "__doc__": base.__doc__})
