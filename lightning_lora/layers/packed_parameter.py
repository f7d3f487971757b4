"""Hold the parts of a packed weight in a module: as parameters, which FSDP2 shards, or as buffers."""

from typing import Any

from torch import nn
from typing_extensions import override

from lightning_lora.ops.packed import PackedWeight

ROW_PARTS = ("codes", "scales")  # parts whose first dimension counts blocks: FSDP2 shards them


class PackedParameter(nn.Parameter):
    """Bytes of a packed weight. They cannot train, and say so in other words than torch's about bytes."""

    @property
    def requires_grad(self) -> bool:
        return False

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self.requires_grad_(value)

    @override
    def requires_grad_(self, requires_grad: bool = True) -> Any:
        if requires_grad:
            raise ValueError(
                "requires_grad=True is set on the bytes of a weight in 4 or 8 bits, which cannot train: leave its "
                "layer out with quantize_exclude=, or build the base without quantize=. To "
                "unfreeze the rest of the model, take its parameters that have is_floating_point()"
            )
        return self


def register_parts(module: nn.Module, name: str, stored: PackedWeight) -> None:
    """Give a module the parts of the packed weight called ``name``."""
    for part, tensor in stored.tensors.items():
        if part in ROW_PARTS:
            module.register_parameter(f"{name}_{part}", PackedParameter(tensor.detach(), requires_grad=False))
        else:
            module.register_buffer(f"{name}_{part}", tensor)
