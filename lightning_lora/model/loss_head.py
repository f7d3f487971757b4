"""Find the output head of a causal language model, and check that its logits are the head's alone."""

from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from lightning_lora.compat.torch import has_global_hooks, hooks_of, is_compiled
from lightning_lora.layers.base import LoRALayer
from lightning_lora.layers.split import SplitLinear
from lightning_lora.model.families import family_of
from lightning_lora.ops.sharded import is_dtensor

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


def output_head_of(model: Any) -> tuple[Any, float | None]:
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


def frozen_kind(head: Any) -> type[nn.Module] | None:
    """Return the class of a head whose output is its frozen weight's and bias's alone, FSDP's left out; else None."""
    kind: type[Any] = next(cls for cls in type(head).__mro__ if not issubclass(cls, FSDPModule))
    is_split = issubclass(kind, SplitLinear) and kind.tp_dim == 0 and not isinstance(head, LoRALayer)
    if (kind is not nn.Linear and not is_split) or "forward" in vars(head) or is_compiled(head):
        return None
    if has_global_hooks():
        return None
    is_sharded = isinstance(head, FSDPModule)
    if any(not is_sharded or not hook.__module__.startswith("torch.distributed.fsdp") for hook in hooks_of(head)):
        return None
    tensors = [head.weight] if head.bias is None else [head.weight, head.bias]
    if any(tensor.requires_grad or not tensor.is_floating_point() for tensor in tensors):
        return None
    if not is_sharded and any(is_dtensor(tensor) or type(tensor) not in (Tensor, nn.Parameter) for tensor in tensors):
        return None
    return kind
