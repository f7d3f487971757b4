"""Put plain parameters in the place of weights that are stored in another form, and put those back.

The forms are those of :mod:`lightning_lora.layers.stored` where the layer is a linear one without them: the packed
weights of :class:`QuantizedModule`, bitsandbytes' layers, torchao's weights.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.layers.class_swap import class_of, recipe
from lightning_lora.layers.packed_parameter import register_parts
from lightning_lora.layers.quantized import Origin, QuantizedModule
from lightning_lora.layers.quantized_linear import QuantizedLinear
from lightning_lora.layers.stored import stored_form
from lightning_lora.ops.packed import PackedWeight
from lightning_lora.ops.sharded import is_dtensor, logical
from lightning_lora.ops.stored import StoredWeight

_BITSANDBYTES = ("bitsandbytes.nn.modules.Linear4bit", "bitsandbytes.nn.modules.Linear8bitLt")


@dataclass
class Former:
    """A weight as it was stored, and the class of its module, while another weight stands in its place."""

    module: nn.Module
    name: str
    stored: Any  # a PackedWeight on CPU, or the parameter
    parents: Any  # of the module's class
    order: tuple[str, ...]  # of its parameters
    reader: Any  # the lora_stored of the layer
    origin: Origin | None  # of a packed weight
    attributes: dict[str, Any]  # what else the class kept on the module
    put_as: torch.dtype  # of what was put in its place

    def put_back(self) -> None:
        """Give the module the stored weight and its class back, on the device of what stood in their place."""
        module, name = self.module, self.name
        packed = isinstance(module, QuantizedModule) and name in module.quantized
        there: Any = module.stored(name) if packed else module.get_parameter(name)  # type: ignore[operator]
        device = there.device
        if packed:
            _drop_parts(module, name)
        else:
            del module._parameters[name]
        module.__class__ = class_of(self.parents)
        if self.reader is not None:
            module.__dict__["lora_stored"] = self.reader
        module.__dict__.update(self.attributes)
        if isinstance(self.stored, PackedWeight):
            # half() and others may have cast what stood there
            dtype = there.dtype if self.put_as == self.stored.dtype else self.stored.dtype
            _hold_parts(module, name, replace(self.stored.to(device), dtype=dtype), self.origin)
        else:
            module._parameters[name] = self.stored if self.stored.device == device else self.stored.to(device)
        _sort(module, self.order)


def is_bitsandbytes(module: nn.Module) -> bool:
    """Whether a module is one of bitsandbytes' linear layers."""
    return _bitsandbytes_base(type(module)) is not None


def stored_names(module: nn.Module) -> list[str]:
    """Return the names of the weights that a module itself stores in another form."""
    packed = list(module.quantized) if isinstance(module, QuantizedModule) else []
    return packed or [name for name in ("weight",) if _handle(module, name) is not None]


def stored_kind(module: nn.Module, name: str) -> str | None:
    """Return the form that a weight is stored in, in a word; ``None`` for a plain parameter, or none."""
    handle: Any = _handle(module, name)
    return None if handle is None else str(getattr(handle, "kind", type(module._parameters.get(name)).__name__))


def weight_dtype(module: nn.Module, name: str, others: torch.dtype | None = None) -> torch.dtype:
    """Return the dtype that a weight has, or is to have as a plain parameter in the place of a stored one.

    Args:
        others: dtype of the frozen parameters beside such layers.
    """
    handle = _handle(module, name)
    if handle is None:
        return module._parameters[name].dtype  # type: ignore[union-attr]  # it is there
    if not is_bitsandbytes(module):
        return handle.dtype
    # its layers take an input of any dtype, and cast their bias to it
    bias = module._parameters.get("bias")
    return others or (handle.dtype if bias is None else bias.dtype)


def weight_shape(module: nn.Module, name: str) -> torch.Size:
    """Return the shape of a weight, also of one that is stored in another form."""
    handle = _handle(module, name)
    if handle is None:
        shape: torch.Size = logical(module._parameters[name]).shape
        return shape
    is_transposed = isinstance(module, QuantizedModule) and module.packs_transpose
    return handle.shape[::-1] if is_transposed else handle.shape


def dense_weight(module: nn.Module, name: str) -> Tensor:
    """Return the values of a weight, plain or stored in another form, in float32 or wider."""
    handle = _handle(module, name)
    if handle is not None:
        return turned(module, handle.dense(torch.promote_types(handle.dtype, torch.float32)))
    weight = module._parameters[name]
    assert weight is not None
    return weight.detach().to(torch.promote_types(weight.dtype, torch.float32))


def turned(module: nn.Module, values: Tensor) -> Tensor:
    """Return values of a weight in the layout that ``module`` packs it in, or packed ones in the weight's layout."""
    return module.turn(values) if isinstance(module, QuantizedModule) else values


def put_plain(module: nn.Module, name: str, values: Tensor) -> Former:
    """Put a frozen plain parameter in the place of a weight that is stored in another form, in place."""
    former = _take(module, name, values.dtype)
    module._parameters[name] = nn.Parameter(values.contiguous(), requires_grad=False)
    _sort(module, (name, *former.order))
    return former


def put_packed(module: nn.Module, name: str, packed: PackedWeight) -> Former:
    """Put a packed weight in the place of a linear layer's that is stored in another form, in place."""
    former = _take(module, name, packed.dtype)
    if not isinstance(module, QuantizedModule):
        was_packed = isinstance(former.stored, PackedWeight)
        module.__class__ = class_of(former.parents if was_packed else _with_mixin(recipe(type(module))))
    _hold_parts(module, name, packed, None)
    return former


def plain_base(cls: type) -> type:
    """Return the class that a layer has with a plain weight: without the mixin of packed weights, ``nn.Linear`` for
    bitsandbytes' layers.
    """
    return class_of(_plain(recipe(cls)))


@contextmanager
def reading(module: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Let a module's code read other values of its own parameters inside the block."""
    former, reader = dict(module._parameters), module.__dict__.pop("lora_stored", None)
    module._parameters.update({n: nn.Parameter(value, requires_grad=False) for n, value in values.items()})
    try:
        yield
    finally:
        module._parameters.clear()
        module._parameters.update(former)
        if reader is not None:
            module.__dict__["lora_stored"] = reader


def _handle(module: nn.Module, name: str) -> StoredWeight | None:
    """Return what makes a weight dense; ``None`` for a plain parameter, or none."""
    if isinstance(module, QuantizedModule):
        return module.stored(name) if name in module.quantized else None
    weight = module._parameters.get(name)
    if name != "weight" or weight is None or is_dtensor(weight):
        return None
    form = stored_form(module)
    return None if form is None else form.read(module)


def _take(module: nn.Module, name: str, put_as: torch.dtype) -> Former:
    """Take a stored weight out of a module, which gets the class that it has with plain weights only."""
    reader = module.__dict__.pop("lora_stored", None)
    former = Former(module, name, None, recipe(type(module)), tuple(module._parameters), reader, None, {}, put_as)
    if isinstance(module, QuantizedModule) and name in module.quantized:
        former.stored, former.origin = module.stored(name).to(torch.device("cpu")), module.origins.pop(name, None)
        _drop_parts(module, name)
        if module.quantized:
            return former
        former.attributes = {one: module.__dict__.pop(one) for one in module.form_attributes}
        del former.attributes["quantized"], former.attributes["origins"]
    else:
        former.stored = module._parameters.pop(name)
    module.__class__ = class_of(_plain(former.parents))
    return former


def _drop_parts(module: Any, name: str) -> None:
    empty = module.quantized.pop(name)
    for part in type(empty).sizes(empty.shape):
        delattr(module, f"{name}_{part}")


def _hold_parts(module: Any, name: str, stored: PackedWeight, origin: Origin | None) -> None:
    module.__dict__.setdefault("quantized", {})[name] = type(stored)({}, stored.shape, stored.dtype)
    module.__dict__.setdefault("origins", {}).update({} if origin is None else {name: origin})
    register_parts(module, name, stored)


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
