"""Keep torch from a fused path that reads weights past the adapters."""

from typing import Any

from torch import nn

from lightning_lora.layers import LoRALayer
from lightning_lora.model.state import (
    Injection,
)


def keep_off_fused_paths(model: nn.Module, injection: Injection) -> None:
    """Keep ``nn.TransformerEncoderLayer`` from its fused path in eval, which reads weights past the adapters."""

    def change(module: nn.Module, name: str, value: Any) -> None:
        injection.undo.append((module, name, getattr(module, name)))
        setattr(module, name, value)

    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and any(isinstance(m, LoRALayer) for m in module.modules()):
            change(module, "activation_relu_or_gelu", 0)
        if isinstance(module, nn.TransformerEncoder) and any(isinstance(m, LoRALayer) for m in module.modules()):
            change(module, "use_nested_tensor", False)
