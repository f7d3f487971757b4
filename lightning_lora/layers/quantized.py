""":class:`QuantizedModule` holds parameters packed in 4 or 8 bits; :class:`QuantizedLinear` multiplies by one.

A packed parameter is no parameter of its module any more: the module holds its parts, ``weight_codes``,
``weight_scales`` and others, and reading ``weight`` returns a dense copy. The state dict has bitsandbytes' keys.
"""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_lora.layers.class_swap import SwappedModule, restore_class, swap_class
from lightning_lora.layers.quantized_state import read_parts, state_of
from lightning_lora.ops.linear import autocast_dtype
from lightning_lora.ops.packed import FORMS, PackedWeight, stored_linear

ROW_PARTS = ("codes", "scales")  # parts whose first dimension counts blocks: FSDP2 shards them


class QuantizedModule(SwappedModule):
    """Mixin of modules that hold some of their parameters packed.

    Attributes:
        quantized: the form, shape and dtype of every packed parameter, by its name: a :class:`PackedWeight` without
            tensors.
    """

    class_prefix: ClassVar[str] = "Quantized"
    base_attribute: ClassVar[str] = "quantized_base_class"

    quantized_base_class: ClassVar[type[nn.Module]]
    quantized: dict[str, PackedWeight]

    def stored(self, name: str) -> PackedWeight:
        """Return the packed parameter called ``name``, made of the parts that the module holds."""
        empty = self.quantized[name]
        parts = {part: getattr(self, f"{name}_{part}") for part in type(empty).sizes(empty.shape)}
        return type(empty)(parts, empty.shape, empty.dtype)

    def __getattr__(self, name: str) -> Any:
        if name in self.__dict__.get("quantized", ()):
            stored = self.stored(name)
            return stored.dense(stored.dtype)
        return super().__getattr__(name)

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, empty in self.quantized.items():  # half() and others change the dtype of dense values alone
            dtype = fn(torch.empty(0, dtype=empty.dtype)).dtype
            self.quantized[name] = type(empty)({}, empty.shape, dtype)
        return self

    @override
    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self.quantized:
            stored = self.stored(name)
            for part in stored.tensors:
                destination.pop(f"{prefix}{name}_{part}", None)
            destination |= state_of(stored, prefix + name)

    @override
    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        for name, empty in self.quantized.items():
            parts = read_parts(empty, state_dict, prefix + name)
            state_dict |= {f"{prefix}{name}_{part}": tensor for part, tensor in parts.items()}
        super()._load_from_state_dict(state_dict, prefix, *args)

    @override
    def extra_repr(self) -> str:
        forms = (f"{name}={stored.kind}" for name, stored in self.quantized.items())
        return ", ".join([super().extra_repr(), *forms])


class QuantizedLinear(QuantizedModule):
    """A linear layer with a packed weight; ``isinstance(layer, nn.Linear)`` still holds."""

    in_features: int
    out_features: int
    bias: Tensor | None

    def forward(self, input: Tensor) -> Tensor:
        dtype = autocast_dtype(input)
        x = input if dtype is None or input.dtype == torch.float64 else input.to(dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            return stored_linear(x, self.stored("weight"), bias)


def quantize_parameters(module: nn.Module, names: Mapping[str, str], mixin: type[QuantizedModule]) -> None:
    """Pack parameters of a module in place.

    Args:
        names: the word of ``quantize=``, by the name of each parameter.
    """
    packed = {name: FORMS[kind].quantize(module.get_parameter(name)) for name, kind in names.items()}
    hold(module, packed, mixin)


def hold(module: nn.Module, packed: Mapping[str, PackedWeight], mixin: type[QuantizedModule]) -> None:
    """Put packed weights in the place of the parameters of their names."""
    swap_class(module, mixin)
    assert isinstance(module, QuantizedModule)
    module.quantized = {}
    for name, stored in packed.items():
        del module._parameters[name]
        module.quantized[name] = type(stored)({}, stored.shape, stored.dtype)
        for part, tensor in stored.tensors.items():
            if part in ROW_PARTS:
                module.register_parameter(f"{name}_{part}", nn.Parameter(tensor, requires_grad=False))
            else:
                module.register_buffer(f"{name}_{part}", tensor)


def dequantize_parameters(module: QuantizedModule) -> None:
    """Put dense parameters in the place of the packed ones, in place."""
    dense = {name: nn.Parameter(getattr(module, name), requires_grad=False) for name in module.quantized}
    for name, empty in module.quantized.items():
        for part in type(empty).sizes(empty.shape):
            delattr(module, f"{name}_{part}")
    restore_class(module, "quantized")
    for name, parameter in dense.items():
        module.register_parameter(name, parameter)
