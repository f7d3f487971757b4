"""``adapter_tensors``: hand the adapter of a model that trains to a server, tensor by tensor and without a file."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.checkpoint.all_ranks import meet
from lightning_lora.model.one_adapter import chosen_adapter
from lightning_lora.model.state import OnNonfinite, check_finite, check_not_disabled, require_root
from lightning_lora.ops.sharded import is_part
from lightning_lora.peft.contents import contents, described_tensors
from lightning_lora.peft.describe import describe_for_peft


def adapter_tensors(
    model: nn.Module, adapter: str | None = None, portable: bool = True, *, on_nonfinite: OnNonfinite = "error"
) -> tuple[dict[str, Any], Iterator[tuple[str, Tensor]]]:
    """Return PEFT's config and an iterator over PEFT's names and tensors: what ``save_peft`` would write.

    The tensors are copies on the model's device, which the receiver may change. They are made one layer at a time, of
    the values that the model has then, and none is kept. The base is not read. Example::

        config, tensors = adapter_tensors(model)
        for name, tensor in tensors:  # "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", [r, in]
            send(name, tensor)

    Where adapters are whole on every rank (DDP, ``fsdp_lora``), any rank may call it, alone or with others. Where they
    are spread over ranks (``megatron_lora``, ``shard_adapters=True``), all must call it and go through the whole
    iterator, and each layer is gathered on every rank. No collective is called but those gathers.

    Args:
        adapter: the name of the adapter; ``None`` for the only one.
        portable: as in :func:`~lightning_lora.save_peft`: one rank and one scale for all layers, as servers read them,
            and plain LoRA of an AdaLoRA adapter; ``False`` for the adapter as it is.
        on_nonfinite: what to do about a tensor that holds NaN or infinity, when its turn comes.

    Raises:
        ValueError: there is no such adapter, or several and none is named; it has what the format, or with
            ``portable`` servers, cannot express, or holds NaN or infinity; or only some of the ranks
            called it that all must.
    """
    root = require_root(model)
    seen = chosen_adapter(root, adapter)
    check_not_disabled(root)
    description = describe_for_peft(seen)
    tensors = described_tensors(seen, description)
    if any(map(is_part, tensors.values())):
        meet("adapter_tensors")
    config, made = contents(description, tensors, portable=portable)
    return config, _copies(made, on_nonfinite)


def _copies(made: Iterator[tuple[str, Tensor]], on_nonfinite: OnNonfinite) -> Iterator[tuple[str, Tensor]]:
    for name, value in made:
        check_finite({name: value}, "adapter_tensors", on_nonfinite)
        yield name, value.clone(memory_format=torch.contiguous_format)
