"""The loss of a causal language model from its last hidden states, without whole logits.

Logits are the largest tensors of a step: tokens x vocabulary. With a frozen head they are made a tile at a time and
dropped, and over tensor-parallel ranks each makes its own part.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from lightning_lora.compat.torch import is_transformed
from lightning_lora.layers.split import parts_of_output
from lightning_lora.model.loss_head import frozen_kind, output_head_of
from lightning_lora.ops.cross_entropy.chunked import losses_of_linear
from lightning_lora.ops.cross_entropy.parallel import losses_of_parts

Function = TypeVar("Function", bound=Callable[..., Any])


def _not_compiled(function: Function) -> Function:
    plain: Function = torch.compiler.disable(function)  # it hides the types
    return plain


@_not_compiled
def linear_cross_entropy(
    model: Any,
    hidden: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    num_items: float | Tensor | None = None,
) -> Tensor:
    """Return the mean loss of predicting each next token: transformers' ``model(..., labels=labels).loss``.

    What a model with ``output_router_logits`` adds for its router is not in it.

    Only labelled positions go through the output head. One call serves all strategies:

    - A frozen ``nn.Linear``, whole, split by ``megatron_lora`` or sharded by FSDP2: logits are made a tile of rows
      and columns at a time, and with them the gradient of ``hidden``, which is all that is kept. Of 2,000 rows and a
      vocabulary of 32,000 or more less than a twentieth of the logits exists at once.
    - Any other head (adapted, trained, of another class, with hooks of the user's): its module is called once, and all
      its logits exist.

    Where the head is split, called on all ranks that share the model: one all-gather, of ``2 * tokens`` numbers, in
    forward, and none but the head's own in backward. There is no second derivative, and ``torch.compile`` leaves a gap
    here: how many rows there are is in the data. Under ``torch.func`` (gradients of single samples) all logits exist.

    Args:
        model: a transformers causal language model.
        hidden: ``[batch, tokens, hidden_size]``, the last hidden states of its body.
        labels: ``[batch, tokens]``, aligned with the input and not shifted: position t is predicted from t - 1.
        ignore_index: the label of what is not learned. Where that is all, the loss and its gradients are zero.
        num_items: what the sum of the losses is divided by, instead of the number of labels here. Lightning averages
            gradients over data-parallel ranks and accumulated batches; with the mean number of labels in all of them
            the result is that of one large batch, however unequal they are.

    Returns:
        A scalar in float32, or float64 where ``hidden`` is; of the labels of this rank.

    Raises:
        TypeError: ``hidden`` is no tensor.
        ValueError: shapes do not match, a label is outside the vocabulary, ``num_items`` is no number of labels, or the
            model's logits are not what its head gives.

    Example::

        hidden = self.model.model(input_ids, attention_mask=attention_mask).last_hidden_state
        return linear_cross_entropy(self.model, hidden, labels)

        # on ranks with unequal numbers of labels; the same on every strategy
        num_labels = (labels[:, 1:] != -100).sum().float()
        num_items = self.trainer.strategy.reduce(num_labels, reduce_op="mean")
        return linear_cross_entropy(self.model, hidden, labels, num_items=num_items)
    """
    head, softcap = output_head_of(model)
    if not isinstance(hidden, Tensor):
        raise TypeError(f"hidden is a {type(hidden).__name__} and must be a tensor: pass its .last_hidden_state")
    if hidden.shape[:-1] != labels.shape or labels.ndim != 2:
        raise ValueError(
            f"hidden {list(hidden.shape)} and labels {list(labels.shape)} must be [batch, tokens, hidden_size] and "
            "[batch, tokens]: pass all positions, labels that are not shifted"
        )
    following = F.pad(labels[:, 1:], (0, 1), value=ignore_index).flatten().to(hidden.device)
    if is_transformed():
        return _plain(head, hidden.flatten(0, 1), following.long(), softcap, ignore_index, num_items)
    learned = (following != ignore_index).nonzero()[:, 0]  # [T]
    targets = following[learned].long()
    total = _total(head, hidden.flatten(0, 1)[learned], targets, softcap)
    return total / _divisor(num_items, targets, total)


def _plain(
    head: Any, rows: Tensor, targets: Tensor, softcap: float | None, ignore_index: int, num_items: float | Tensor | None
) -> Tensor:
    """Return the loss by operations that torch can transform: it keeps all rows, as only the data says which count."""
    logits = _within(softcap, head(rows))
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    total = F.cross_entropy(wide, targets, ignore_index=ignore_index, reduction="sum")
    if num_items is None:
        return total / (targets != ignore_index).sum().clamp_min(1)
    return total / _divisor(num_items, targets, total)


def _divisor(num_items: float | Tensor | None, targets: Tensor, total: Tensor) -> float | Tensor:
    if num_items is None:
        return max(targets.numel(), 1)
    if isinstance(num_items, Tensor):
        if num_items.numel() != 1:
            raise ValueError(f"num_items has shape {list(num_items.shape)}; it must be one number")
        # none anywhere is a loss of zero; not read here, which would wait for the device
        return num_items.detach().to(total).reshape(()).clamp_min(torch.finfo(total.dtype).tiny)
    if num_items < 0 or (num_items == 0 and targets.numel()):
        raise ValueError(f"num_items={num_items} is no number of labels, of which there are {targets.numel()} here")
    return num_items or 1


def _total(head: Any, rows: Tensor, targets: Tensor, softcap: float | None) -> Tensor:
    """Return the sum of the losses of rows ``[T, hidden_size]``."""
    kind = frozen_kind(head)
    if kind is not None:
        _check_targets(targets, head.out_features)

    def chunked(rows: Tensor, group: Any = None) -> Tensor:
        return losses_of_linear(rows, head.weight, head.bias, targets, softcap=softcap, group=group)

    if kind is nn.Linear:
        with _forward_replaced(head, chunked) if isinstance(head, FSDPModule) else nullcontext(chunked) as forward:
            losses: Tensor = forward(rows)  # FSDP's hooks gather the weight, once
        return losses.sum()
    if kind is not None:  # column-parallel
        return chunked(head.enter(rows), head.tp_group).sum()
    with parts_of_output(head) as group:
        logits: Tensor = head(rows)  # [T, vocabulary], or this rank's part of it
    _check_targets(targets, logits.shape[1] if group is None else head.out_features)
    logits = _within(softcap, logits)
    if group is not None:
        return losses_of_parts(logits, targets, group).sum()
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets, reduction="sum")


def _within(softcap: float | None, logits: Tensor) -> Tensor:
    return softcap * torch.tanh(logits / softcap) if softcap else logits


@contextmanager
def _forward_replaced(module: Any, forward: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    """Let a module, called inside the block, run its hooks about another forward."""
    module.forward = forward
    try:
        yield module
    finally:
        del module.forward


def _check_targets(targets: Tensor, size: int) -> None:
    # F.cross_entropy stops the process on a GPU, and no rank would have such a row of a split head
    outside = targets[(targets < 0) | (targets >= size)]
    if outside.numel():
        raise ValueError(f"label {int(outside[0])} is outside the vocabulary of {size}")
