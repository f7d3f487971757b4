"""Read weights that are stored in another form than plain numbers, put plain parameters in their place, and back.

These are the packed weights of :class:`QuantizedModule`, bitsandbytes' linear layers, and tensors that wrap others and
can ``dequantize`` (torchao's).
"""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.compat.bitsandbytes import unpack_from_cpu_format
from lightning_lora.layers.class_swap import class_of, recipe
from lightning_lora.layers.quantized import ROW_PARTS, QuantizedLinear, QuantizedModule
from lightning_lora.ops.packed import PackedWeight
from lightning_lora.ops.quantized import wraps_tensors
from lightning_lora.ops.sharded import is_dtensor, logical

_BITSANDBYTES = ("bitsandbytes.nn.modules.Linear4bit", "bitsandbytes.nn.modules.Linear8bitLt")


@dataclass
class Former:
    """A weight as it was stored, and the class of its module, while another weight stands in its place."""

    module: nn.Module
    name: str
    stored: Any  # a PackedWeight on CPU, or the parameter
    parents: Any  # of the module's class
    order: tuple[str, ...]  # of its parameters

    def put_back(self) -> None:
        """Give the module the stored weight and its class back, on the device of what stood in their place."""
        module, name = self.module, self.name
        packed = isinstance(module, QuantizedModule) and name in module.quantized
        device = module.stored(name).device if packed else module.get_parameter(name).device  # type: ignore[operator]
        if packed:
            _drop_parts(module, name)
        else:
            del module._parameters[name]
        module.__class__ = class_of(self.parents)
        if isinstance(self.stored, PackedWeight):
            _hold_parts(module, name, self.stored.to(device))
        else:
            module._parameters[name] = self.stored if self.stored.device == device else self.stored.to(device)
        _sort(module, self.order)


def is_bitsandbytes(module: nn.Module) -> bool:
    """Whether a module is one of bitsandbytes' linear layers."""
    return _bitsandbytes_base(type(module)) is not None


def stored_names(module: nn.Module) -> list[str]:
    """Return the names of the weights that a module itself stores in another form."""
    packed = list(module.quantized) if isinstance(module, QuantizedModule) else []
    own = [name for name, parameter in module._parameters.items() if parameter is not None]
    return packed + [name for name in own if stored_kind(module, name) is not None]


def stored_kind(module: nn.Module, name: str) -> str | None:
    """Return the form that a weight is stored in and can be read from; ``None`` for a plain parameter, or none."""
    if isinstance(module, QuantizedModule) and name in module.quantized:
        return module.quantized[name].kind
    weight: Any = module._parameters.get(name)
    if weight is None or is_dtensor(weight):
        return None
    if name == "weight" and _bitsandbytes_base(type(module)) is not None and not weight.is_floating_point():
        return str(getattr(getattr(weight, "quant_state", None), "quant_type", "int8"))
    is_wrapper = wraps_tensors(weight) and callable(getattr(weight, "dequantize", None))
    return type(weight).__name__ if is_wrapper else None


def weight_dtype(module: nn.Module, name: str) -> torch.dtype:
    """Return the dtype of a weight, or the one that it had before it was stored in another form."""
    if isinstance(module, QuantizedModule) and name in module.quantized:
        return module.quantized[name].dtype
    weight: Any = module._parameters[name]
    if weight.is_floating_point():
        dtype: torch.dtype = weight.dtype
        return dtype
    state = getattr(weight, "quant_state", None)
    if state is not None:
        return state.dtype  # type: ignore[no-any-return]
    bias = module._parameters.get("bias")
    return torch.float16 if bias is None else bias.dtype  # LLM.int8's own


def weight_shape(module: nn.Module, name: str) -> torch.Size:
    """Return the shape of a weight, also of one that is stored in another form."""
    if isinstance(module, QuantizedModule) and name in module.quantized:
        return module.quantized[name].shape
    weight: Any = module._parameters[name]
    state = getattr(weight, "quant_state", None)
    return logical(weight).shape if state is None else torch.Size(state.shape)


def dense_weight(module: nn.Module, name: str) -> Tensor:
    """Return the values of a weight, plain or stored in another form, in float32 or wider."""
    if isinstance(module, QuantizedModule) and name in module.quantized:
        return module.stored(name).dense(_wide(module.quantized[name].dtype))
    weight: Any = module._parameters[name]
    if stored_kind(module, name) is None:
        plain: Tensor = weight.detach()
    elif wraps_tensors(weight) and callable(getattr(weight, "dequantize", None)):
        plain = weight.detach().dequantize()
    else:
        plain = _bitsandbytes_dense(module, weight)
    return plain.to(_wide(plain.dtype))


def put_plain(module: nn.Module, name: str, values: Tensor) -> Former:
    """Put a frozen plain parameter in the place of a weight that is stored in another form, in place."""
    former = _take(module, name)
    module._parameters[name] = nn.Parameter(values, requires_grad=False)
    _sort(module, (name, *former.order))
    return former


def put_packed(module: nn.Module, name: str, packed: PackedWeight) -> Former:
    """Put a packed weight in the place of a linear layer's that is stored in another form, in place."""
    former = _take(module, name)
    if not isinstance(module, QuantizedModule):
        module.__class__ = class_of(_with_mixin(recipe(type(module))))
        module.__dict__["quantized"] = {}
    _hold_parts(module, name, packed)
    return former


def plain_base(cls: type) -> type:
    """Return the class that a layer has with a plain weight: without the mixin of packed weights, ``nn.Linear`` for
    bitsandbytes' layers.
    """
    return class_of(_plain(recipe(cls)))


@contextmanager
def reading(module: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Let a module's code read other values of its own parameters inside the block."""
    former = dict(module._parameters)
    module._parameters.update({n: nn.Parameter(value, requires_grad=False) for n, value in values.items()})
    try:
        yield
    finally:
        module._parameters.clear()
        module._parameters.update(former)


def _take(module: nn.Module, name: str) -> Former:
    """Take a stored weight out of a module, which gets the class that it has with plain weights only."""
    parents, order = recipe(type(module)), tuple(module._parameters)
    if isinstance(module, QuantizedModule) and name in module.quantized:
        former = Former(module, name, module.stored(name).to(torch.device("cpu")), parents, order)
        _drop_parts(module, name)
        if module.quantized:
            return former
        del module.__dict__["quantized"]
    else:
        former = Former(module, name, module._parameters.pop(name), parents, order)
    module.__class__ = class_of(_plain(parents))
    return former


def _drop_parts(module: Any, name: str) -> None:
    empty = module.quantized.pop(name)
    for part in type(empty).sizes(empty.shape):
        delattr(module, f"{name}_{part}")


def _hold_parts(module: Any, name: str, stored: PackedWeight) -> None:
    module.__dict__.setdefault("quantized", {})[name] = type(stored)({}, stored.shape, stored.dtype)
    for part, tensor in stored.tensors.items():
        if part in ROW_PARTS:
            module.register_parameter(f"{name}_{part}", nn.Parameter(tensor, requires_grad=False))
        else:
            module.register_buffer(f"{name}_{part}", tensor)


def _sort(module: nn.Module, order: tuple[str, ...]) -> None:
    """Give the parameters of a module an order; what it does not name stays behind."""
    parameters = dict(module._parameters)
    module._parameters.clear()
    module._parameters.update({name: parameters.pop(name) for name in order if name in parameters} | parameters)


def _plain(parents: Any) -> Any:
    """Return a class's recipe without forms of weights in it."""
    if isinstance(parents, tuple):
        mixin, base = parents
        return _plain(base) if issubclass(mixin, QuantizedModule) else (mixin, _plain(base))
    return _bitsandbytes_base(parents) or parents


def _with_mixin(parents: Any) -> Any:
    return (parents[0], _with_mixin(parents[1])) if isinstance(parents, tuple) else (QuantizedLinear, parents)


def _bitsandbytes_base(cls: type) -> type | None:
    names = {f"{base.__module__}.{base.__qualname__}" for base in cls.__mro__}
    return None if names.isdisjoint(_BITSANDBYTES) else nn.Linear


def _bitsandbytes_dense(module: Any, weight: Any) -> Tensor:
    functional: Any = sys.modules["bitsandbytes.functional"]  # it is there where a model holds its layers
    state = getattr(weight, "quant_state", None)
    if state is not None:
        if getattr(state, "packing_format_for_cpu", False):
            state = unpack_from_cpu_format(weight, state)
        dense: Tensor = functional.dequantize_4bit(weight.data, state)
        return dense
    scales = weight.SCB if weight.SCB is not None else module.state.SCB
    rows: Tensor = functional.int8_vectorwise_dequant(weight.data, scales)
    return rows


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
