"""The loss of a causal language model whose output head may be split over tensor-parallel ranks.

Whole logits would cost an all-gather of tokens x vocabulary, and as much memory on every rank. Each rank's own part is
enough: ranks agree on three numbers per token, the largest logit, the sum of exponentials and the target's logit.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lora.layers.parallel import parts_of_output
from lightning_lora.root import is_megatron

# fields of transformers' configs by which a model changes what its head gives, with the value that changes nothing
_CHANGES = {
    "logit_scale": 1.0,
    "logits_scaling": 1.0,
    "lm_head_multiplier": 1.0,
    "output_multiplier": 1.0,
    "output_logit_soft_cap": 0.0,
}


def vocab_parallel_cross_entropy(model: Any, hidden: Tensor, labels: Tensor, *, ignore_index: int = -100) -> Tensor:
    """Return the mean loss of predicting each next token: transformers' ``model(..., labels=labels).loss``.

    Only labelled positions go through the output head. It may be whole, sharded or split, adapted or not, so that one
    ``training_step`` serves all strategies. Where it is split, on all ranks that share the model: two all-reduces, of
    ``tokens`` and of ``2 * tokens`` numbers, in forward and none but the head's own in backward.

    Args:
        model: a transformers causal language model.
        hidden: ``[batch, tokens, hidden_size]``, the last hidden states of its body.
        labels: ``[batch, tokens]``, aligned with the input: position t is predicted from t - 1.
        ignore_index: the label of what is not learned. Where that is all, the loss and its gradients are zero.

    Raises:
        ValueError: shapes do not match, a label is outside the vocabulary, or the model's logits are not what its head
            gives.

    Example::

        hidden = self.model.model(input_ids, attention_mask=attention_mask).last_hidden_state
        return vocab_parallel_cross_entropy(self.model, hidden, labels)
    """
    head, softcap = _head(model)
    if hidden.shape[:-1] != labels.shape or labels.ndim != 2:
        raise ValueError(
            f"hidden {list(hidden.shape)} and labels {list(labels.shape)} must be [batch, tokens, hidden_size] and "
            "[batch, tokens]: pass all positions, labels that are not shifted"
        )
    targets = labels[:, 1:].to(hidden.device)
    learned = targets != ignore_index
    targets = targets[learned]  # [T]
    with parts_of_output(head) as group:
        logits: Tensor = head(hidden[:, :-1][learned])  # [T, vocabulary], or this rank's part of it
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    if group is None:
        wide = torch.promote_types(logits.dtype, torch.float32)
        total = F.cross_entropy(logits.to(wide), targets, reduction="sum")
    else:
        _check_targets(targets, head.out_features)
        total = _VocabParallelCrossEntropy.apply(logits, targets, group).sum()  # type: ignore[no-untyped-call]
    return total / max(targets.numel(), 1)


def _head(model: Any) -> tuple[Any, float | None]:
    """Return the output head and the bound that the model's logits are softly kept within, if any."""
    head = model.get_output_embeddings() if callable(getattr(model, "get_output_embeddings", None)) else None
    if is_megatron(model):
        raise ValueError("a GPTModel computes this loss by itself: call it with labels=, shifted by one")
    if head is None:
        raise ValueError(
            f"{type(model).__name__} has no output head: pass a transformers causal language model, such as "
            "AutoModelForCausalLM gives"
        )
    config = model.config.get_text_config()
    changes = [name for name, none in _CHANGES.items() if getattr(config, name, None) not in (None, none)]
    if changes or config.is_encoder_decoder:
        what = f"{changes[0]}={getattr(config, changes[0])!r}" if changes else "an encoder and a decoder"
        raise ValueError(
            f"{type(model).__name__} has {what}, which this loss does not know: use model(..., labels=labels).loss"
        )
    return head, getattr(config, "final_logit_softcapping", None)


def _check_targets(targets: Tensor, size: int) -> None:
    # no rank would have such a row, and the loss would be that of a logit of zero
    outside = targets[(targets < 0) | (targets >= size)]
    if outside.numel():
        raise ValueError(f"label {int(outside[0])} is outside the vocabulary of {size}")


class _VocabParallelCrossEntropy(torch.autograd.Function):
    """``log sum exp(z) - z[target]``, ``[T]``, of logits z ``[T, vocabulary / ranks]`` that are split over a group.

    Every rank gets the same losses, and the gradient of its own part: ``softmax(z) - onehot(target)``. The softmax is
    made again in backward, from the logits in their own dtype, instead of being kept in float32.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, group: Any) -> Tensor:
        size = logits.shape[1]
        z = logits.to(torch.promote_types(logits.dtype, torch.float32))
        highest = z.amax(1)  # [T]
        torch.distributed.all_reduce(highest, torch.distributed.ReduceOp.MAX, group=group)
        row = targets - torch.distributed.get_rank(group) * size
        is_here = (row >= 0) & (row < size)
        row = row.clamp(0, size - 1)
        sums = torch.stack([(z - highest[:, None]).exp().sum(1), z.gather(1, row[:, None])[:, 0] * is_here])
        torch.distributed.all_reduce(sums, group=group)
        normalizer = highest + sums[0].log()
        ctx.save_for_backward(logits, normalizer, row, is_here)
        return normalizer - sums[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        logits, normalizer, row, is_here = ctx.saved_tensors
        slope = (logits.to(normalizer.dtype) - normalizer[:, None]).exp_()  # [T, vocabulary / ranks]
        slope.scatter_add_(1, row[:, None], -is_here.to(slope.dtype)[:, None])
        return slope.mul_(grad[:, None]).to(logits.dtype), None, None
