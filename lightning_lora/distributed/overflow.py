"""Share an overflow of scaled gradients among all ranks, so that all of them skip the step."""

from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_lora.compat.torch import UNSCALE, unscaling_of
from lightning_lora.ops.sharded import local_part


def share_overflows(scaler: Any, reduce_gradients: Callable[[], None]) -> None:
    """Make a ``GradScaler`` reduce gradients before it unscales them, and share what it finds with all ranks.

    Both of its ways, ``unscale_`` and the check for optimizers that unscale by themselves, go through the one method
    that is wrapped. It costs one all-reduce of one number per step. Wrapping twice is wrapping once; ``None`` is left.

    Args:
        reduce_gradients: called on all ranks before each check: what is reduced after it could overflow unseen.

    Raises:
        ValueError: the scaler has no such method.
    """
    if scaler is None:
        return
    unscale = unscaling_of(scaler)

    def unscale_together(optimizer: Optimizer, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool) -> Any:
        reduce_gradients()
        found = unscale(scaler, _local_gradients(optimizer), inv_scale, found_inf, allow_fp16)
        anywhere = torch.stack([value.to(found_inf.device) for value in (found_inf, *found.values())]).max()
        torch.distributed.all_reduce(anywhere, torch.distributed.ReduceOp.MAX)
        for value in found.values():
            value.copy_(anywhere)
        return found

    scaler.__dict__[UNSCALE] = unscale_together


def check_scalable(scaler: Any, optimizers: Iterable[Any]) -> None:
    """Raise ``ValueError`` for trained parameters in float16, whose gradients a ``GradScaler`` refuses to unscale.

    Args:
        scaler: ``None`` checks nothing.
    """
    if scaler is None:
        return
    for optimizer in optimizers:
        narrow = [p for group in optimizer.param_groups for p in group["params"] if p.dtype == torch.float16]
        if any(parameter.requires_grad for parameter in narrow):
            raise ValueError(
                f"precision='16-mixed' scales gradients, and {len(narrow)} tensors that train are in float16, which "
                f"{type(scaler).__name__} cannot unscale. Adapters, heads and biases are kept in float32 by "
                "the default adapter_dtype='float32' ('auto' keeps the weight's own dtype); bring what else trains to "
                "float32, or use precision='bf16-mixed'"
            )


def keep_overflows(scaler: Any) -> None:
    """Undo :func:`share_overflows`."""
    if scaler is not None:
        scaler.__dict__.pop(UNSCALE, None)


def _local_gradients(optimizer: Optimizer) -> Any:
    """Return the parameters for reading, FSDP2's as this rank's part: torch refuses those beside whole ones."""
    groups = [{"params": [_local(parameter) for parameter in group["params"]]} for group in optimizer.param_groups]
    return SimpleNamespace(param_groups=groups)


def _local(parameter: Any) -> Any:
    if parameter.grad is None or local_part(parameter.grad) is parameter.grad:
        return parameter
    part = local_part(parameter.detach())
    part.grad = local_part(parameter.grad)
    return part
