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

from lightning_lora.layers.base import LoRALayer
from lightning_lora.layers.split import SplitLinear, parts_of_output
from lightning_lora.model.families import family_of
from lightning_lora.ops.cross_entropy.chunked import losses_of_linear
from lightning_lora.ops.cross_entropy.parallel import losses_of_parts
from lightning_lora.ops.linear import is_transformed
from lightning_lora.ops.sharded import is_dtensor

Function = TypeVar("Function", bound=Callable[..., Any])

# fields of transformers' configs by which a model changes what its head gives, with the value that changes nothing
_CHANGES = {
    "logit_scale": 1.0,
    "logits_scaling": 1.0,
    "lm_head_multiplier": 1.0,
    "output_multiplier": 1.0,
    "output_logit_soft_cap": 0.0,
    "logits_soft_cap": 0.0,
    "logits_mup_width_multiplier": 1.0,
}
# whose own loss does not shift labels, or whose head gets what other layers made of the body's output
_OTHERS = {"cpmant", "electra", "flaubert", "modernbert-decoder", "trocr", "xlm"}


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
    head, softcap = _head(model)
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
    logits: Tensor = head(rows)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    total = F.cross_entropy(wide, targets, ignore_index=ignore_index, reduction="sum")
    if num_items is None:
        return total / (targets != ignore_index).sum().clamp_min(1)
    return total / _divisor(num_items, targets, total)


def _head(model: Any) -> tuple[Any, float | None]:
    """Return the output head and the bound that the model's logits are softly kept within, if any."""
    family = family_of(model) if isinstance(model, nn.Module) else None
    if family is not None and family.own_loss is not None:
        raise ValueError(family.own_loss)
    head = model.get_output_embeddings() if callable(getattr(model, "get_output_embeddings", None)) else None
    if head is None:
        raise ValueError(
            f"{type(model).__name__} has no output head: pass a transformers causal language model, such as "
            "AutoModelForCausalLM gives, and not the LightningModule around it"
        )
    config = model.config.get_text_config()
    what = _difference(model, head, config)
    if what is not None:
        raise ValueError(
            f"{type(model).__name__} has {what}, which this loss does not know: use model(..., labels=labels).loss"
        )
    return head, getattr(config, "final_logit_softcapping", None)


def _difference(model: Any, head: Any, config: Any) -> str | None:
    """Return what makes a model's logits or its own loss another than those of its head, if anything does."""
    for name, none in _CHANGES.items():
        if getattr(config, name, None) not in (None, none):
            return f"{name}={getattr(config, name)!r}"
    unpadded = getattr(config, "unpadded_vocab_size", None)
    if unpadded is not None and unpadded < config.vocab_size:
        return f"unpadded_vocab_size={unpadded}"
    if config.is_encoder_decoder:
        return "an encoder and a decoder"
    if getattr(type(config), "is_encoder_decoder", False):
        return "the decoder of an encoder, whose labels are not shifted"
    if config.model_type in _OTHERS:
        return f"model_type={config.model_type!r}"
    if any(child is head for child in model._modules.values()):
        return None
    holder = next((one for one in model.modules() if any(child is head for child in one._modules.values())), model)
    if callable(getattr(holder, "get_output_embeddings", None)):  # the language model inside a larger one
        return None
    others = [
        name
        for name, child in holder.named_children()
        if child is not head and next(child.parameters(), None) is not None
    ]
    return f"{', '.join(others)} before its head" if others else None


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
    kind = _frozen_kind(head)
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
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    if group is not None:
        return losses_of_parts(logits, targets, group).sum()
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets, reduction="sum")


def _frozen_kind(head: Any) -> type[nn.Module] | None:
    """Return the class of a head whose output is its frozen weight's and bias's alone, FSDP's left out; else None."""
    kind: type[Any] = next(cls for cls in type(head).__mro__ if not issubclass(cls, FSDPModule))
    is_split = issubclass(kind, SplitLinear) and kind.tp_dim == 0 and not isinstance(head, LoRALayer)
    if (kind is not nn.Linear and not is_split) or "forward" in vars(head) or head._compiled_call_impl is not None:
        return None
    if nn.modules.module._has_any_global_hook():
        return None
    hooks = [
        *head._forward_hooks.values(),
        *head._forward_pre_hooks.values(),
        *head._backward_hooks.values(),
        *head._backward_pre_hooks.values(),
    ]
    is_sharded = isinstance(head, FSDPModule)
    if any(not is_sharded or not hook.__module__.startswith("torch.distributed.fsdp") for hook in hooks):
        return None
    tensors = [head.weight] if head.bias is None else [head.weight, head.bias]
    if any(tensor.requires_grad or not tensor.is_floating_point() for tensor in tensors):
        return None
    if not is_sharded and any(is_dtensor(tensor) or type(tensor) not in (Tensor, nn.Parameter) for tensor in tensors):
        return None
    return kind


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
