"""What a user of lightning_lora writes around an adapted model: the optimizer and the loss of a whole step.

The one place that knows their names and arguments; where one is not in the package, torch's best takes its place and
:func:`described` says so.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lightning_lora

IGNORED = -100  # the label of a position that is not learned
LoRAAdamW: Any = getattr(lightning_lora, "LoRAAdamW", None)
linear_cross_entropy: Any = getattr(lightning_lora, "linear_cross_entropy", None)


def described() -> str:
    optimizer = "LoRAAdamW" if LoRAAdamW is not None else "torch.optim.AdamW(fused=True)"
    loss = "linear_cross_entropy" if linear_cross_entropy is not None else "F.cross_entropy of the learned positions"
    return f"{optimizer}, {loss}"


def optimizer_of(parameters: Iterable[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    parameters = list(parameters)
    if LoRAAdamW is not None:
        return LoRAAdamW(parameters, lr=lr)
    return torch.optim.AdamW(parameters, lr=lr, fused=True)


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
