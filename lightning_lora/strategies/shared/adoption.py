"""Swap a stock strategy's class in place, so that it saves and loads adapter-only checkpoints."""

from typing import Any

from lightning_lora.checkpoint.atomic_io import make_atomic
from lightning_lora.distributed.ddp import prepare_ddp
from lightning_lora.layers.class_swap import swap_class


def adopt_class(strategy: Any, mixin: Any, ddp: type[Any]) -> None:
    """Give ``strategy`` the class ``LoRA<Class>(mixin, <Class>)``, once.

    Args:
        ddp: Trainer's or Fabric's strategy for DDP, whose reducer is set up otherwise.
    """
    make_atomic(strategy.checkpoint_io)
    if not isinstance(strategy, mixin):
        if isinstance(strategy, ddp):
            prepare_ddp(strategy)
        swap_class(strategy, mixin)
