"""Say in the config that ``save_pretrained`` writes how a base is quantised, so that ``from_pretrained`` reads it back.

The packed weights have bitsandbytes' names and bytes in a state dict, and so does their config.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from lightning_lora.layers.quantized import QuantizedModule


@contextmanager
def quantization_in_config(model: nn.Module) -> Iterator[None]:
    """Let the config of a model that :func:`~lightning_lora.quantize` packed name the form, inside the block."""
    plan, config = vars(model).get("lora_quantization"), getattr(model, "config", None)
    packed = next((module for module in model.modules() if isinstance(module, QuantizedModule)), None)
    if plan is None or packed is None or config is None:
        yield
        return
    (stored, *_) = packed.quantized.values()
    config.quantization_config = _bitsandbytes_config(plan, str(stored.dtype).removeprefix("torch."))
    try:
        yield
    finally:
        del config.quantization_config


def _bitsandbytes_config(plan: Any, dtype: str) -> dict[str, Any]:
    """Return the fields of transformers' ``BitsAndBytesConfig``."""
    is_4bit = plan.kind != "int8"
    fields: dict[str, Any] = {"quant_method": "bitsandbytes", "load_in_4bit": is_4bit, "load_in_8bit": not is_4bit}
    if is_4bit:
        fields |= {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": plan.kind == "nf4-dq"}
        fields |= {"bnb_4bit_compute_dtype": dtype, "bnb_4bit_quant_storage": "uint8"}
    return fields | {"llm_int8_skip_modules": list(plan.left_out)}
