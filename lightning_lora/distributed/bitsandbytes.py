"""Prepare models that bitsandbytes quantised for FSDP2, which shards their packed bytes; their scales stay whole."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.layers.bitsandbytes import read_4bit
from lightning_lora.model.names import clean_name
from lightning_lora.ops.sharded import is_sharded

_FOUR_BITS = ("bitsandbytes.nn.modules.Linear4bit", "bitsandbytes.nn.modules.Embedding4bit")
_EIGHT_BITS = ("bitsandbytes.nn.modules.Linear8bitLt", "bitsandbytes.nn.modules.Embedding8bit")


def check_bitsandbytes(root: nn.Module) -> None:
    """Raise ``ValueError`` for layers of bitsandbytes that cannot be sharded: their forward needs what shards lose."""
    for name, module in root.named_modules():
        if _is_a(module, _EIGHT_BITS):
            raise ValueError(
                f"{clean_name(name)!r} is bitsandbytes' {type(module).__name__}, whose forward keeps a whole copy of "
                "its weight: load the base in 16 bits and give quantize='int8', which is sharded, or load_in_4bit"
            )
        if _is_a(module, _FOUR_BITS) and not is_sharded(module._parameters["weight"]) and read_4bit(module) is None:
            raise ValueError(
                f"{clean_name(name)!r} is bitsandbytes' {type(module).__name__} and not quantised yet: move the model "
                "to its device before it is sharded, or load it with device_map="
            )


def store_as_bytes(root: nn.Module) -> None:
    """Store the codes of bitsandbytes' 4-bit layers as uint8, in place, and their scales with the layer.

    A mixed-precision policy would cast codes that are seen as numbers, and shards forget what hangs on a parameter.
    """
    for module in _four_bit_layers(root):
        weight = module._parameters["weight"]
        if is_sharded(weight):
            continue
        read_4bit(module)  # undoes the order that an evaluation on CPU stores codes in
        module.quant_state = getattr(weight, "quant_state", None) or module.quant_state
        module.quant_storage = torch.uint8
        codes = weight.data.as_subclass(Tensor).contiguous().view(torch.uint8).view(-1, 1)
        module._parameters["weight"] = nn.Parameter(codes, requires_grad=False)


def scales_of(root: nn.Module) -> list[Tensor]:
    """Return the tensors of the scales of bitsandbytes' 4-bit layers, which are no parameters and no buffers."""
    tensors = []
    for module in _four_bit_layers(root):
        for state in (module.quant_state, module.quant_state.state2):
            tensors += [] if state is None else [state.absmax, state.code]
        tensors += [] if module.quant_state.offset is None else [module.quant_state.offset]
    return tensors


def move_scales(root: nn.Module, device: torch.device) -> None:
    """Move the scales of bitsandbytes' 4-bit layers, in place."""
    for module in _four_bit_layers(root):
        module.quant_state.to(device)


def _four_bit_layers(root: nn.Module) -> Iterator[Any]:
    return (module for module in root.modules() if _is_a(module, _FOUR_BITS))


def _is_a(module: nn.Module, names: tuple[str, ...]) -> bool:
    return any(f"{cls.__module__}.{cls.__qualname__}" in names for cls in type(module).__mro__)
