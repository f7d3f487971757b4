"""What a user of lightning_lora writes around an adapted model: the optimizer and the loss of a whole step.

The one place that knows their names and arguments; where one is not in the package, torch's best takes its place and
:func:`described` says so.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lightning_lora

IGNORED = -100  # the label of a position that is not learned
linear_cross_entropy: Any = getattr(lightning_lora, "linear_cross_entropy", None)


class Stepper(NamedTuple):
    """An optimizer, and its step with clipping."""

    optimizer: torch.optim.Optimizer
    clip_and_step: Callable[[], Any]


def described() -> str:
    loss = "linear_cross_entropy" if linear_cross_entropy is not None else "F.cross_entropy of the learned positions"
    return f"torch.optim.AdamW(fused=True), {loss}"


def stepper_of(parameters: Iterable[nn.Parameter], lr: float, max_norm: float) -> Stepper:
    """Return AdamW in one kernel, and torch's clipping."""
    return torch_stepper(parameters, lr, max_norm, fused=True)


def torch_stepper(parameters: Iterable[nn.Parameter], lr: float, max_norm: float, **options: Any) -> Stepper:
    parameters = list(parameters)
    optimizer = torch.optim.AdamW(parameters, lr=lr, **options)

    def clip_and_step() -> None:
        nn.utils.clip_grad_norm_(parameters, max_norm)
        optimizer.step()

    return Stepper(optimizer, clip_and_step)


def loss_of(model: Any, hidden: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross entropy of the next tokens.

    Args:
        model: a causal language model of transformers.
        hidden: ``[batch, T, hidden_size]``, what its output head is given.
        labels: ``[batch, T]``, not shifted, ``IGNORED`` where nothing is learned.
    """
    if linear_cross_entropy is not None:
        return linear_cross_entropy(model, hidden, labels)
    return learned_positions_loss(model, hidden, labels)


def learned_positions_loss(model: Any, hidden: Tensor, labels: Tensor) -> Tensor:
    """Return the same from logits of the learned positions alone, as a careful user of any library writes it."""
    targets = labels[:, 1:]
    learned = targets != IGNORED
    return F.cross_entropy(model.lm_head(hidden[:, :-1][learned]), targets[learned])
