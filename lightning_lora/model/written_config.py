"""Say in the config that ``save_pretrained`` writes how a base is quantised, so that ``from_pretrained`` reads it back.

The packed weights have bitsandbytes' names and bytes in a state dict, and so does their config.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from lightning_lora.layers.quantized import QuantizedModule
from lightning_lora.layers.quantized_linear import packing_mixin
from lightning_lora.ops.packed import PackedWeight


@contextmanager
def quantization_in_config(model: nn.Module) -> Iterator[None]:
    """Let the config of a model with packed layers name their form, inside the block."""
    config = getattr(model, "config", None)
    packed = next((module for module in model.modules() if isinstance(module, QuantizedModule)), None)
    if packed is None or config is None:
        yield
        return
    for name, module in model.named_modules():
        if isinstance(module, QuantizedModule) and any(len(one.shape) == 3 for one in module.quantized.values()):
            raise ValueError(
                f"{name!r} holds packed matrices of experts, which bitsandbytes' checkpoints have no form for: save "
                "model.state_dict(), or save_peft(model, directory) for an adapter, or leave the experts whole with "
                "quantize_exclude"
            )
    (stored, *_) = packed.quantized.values()
    linear = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) or packing_mixin(m) is not None}
    plain = [name for name, module in linear.items() if not isinstance(module, QuantizedModule)]
    config.quantization_config = _bitsandbytes_config(stored, plain)
    try:
        yield
    finally:
        del config.quantization_config


def _bitsandbytes_config(stored: PackedWeight, plain: list[str]) -> dict[str, Any]:
    """Return the fields of transformers' ``BitsAndBytesConfig`` for a base with these layers left out."""
    is_4bit = stored.kind != "int8"
    fields: dict[str, Any] = {"quant_method": "bitsandbytes", "load_in_4bit": is_4bit, "load_in_8bit": not is_4bit}
    if is_4bit:
        fields |= {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": stored.kind == "nf4-dq"}
        fields |= {"bnb_4bit_compute_dtype": str(stored.dtype).removeprefix("torch.")}
        fields |= {"bnb_4bit_quant_storage": "uint8"}
    return fields | {"llm_int8_skip_modules": plain}
