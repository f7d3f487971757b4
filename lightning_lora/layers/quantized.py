""":class:`QuantizedModule` holds parameters packed in 4 or 8 bits.

A packed parameter is no parameter of its module any more: the module holds its parts, ``weight_codes``,
``weight_scales`` and others, and reading ``weight`` returns a dense copy, of a matrix, or a :class:`PackedStack`. The
state dict has bitsandbytes' keys.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_lora.compat.torch import before_pruning
from lightning_lora.layers.class_swap import SwappedModule, restore_class, swap_class
from lightning_lora.layers.packed_parameter import register_parts
from lightning_lora.layers.quantized_state import read_parts, scales_name, state_of
from lightning_lora.ops.packed import FORMS, PackedWeight
from lightning_lora.ops.packed_stack import PackedStack
from lightning_lora.ops.sample_hash import dtype_name, sample_hash
from lightning_lora.ops.sharded import is_sharded


class Origin(NamedTuple):
    """What is known of the weight that a packed one was made from.

    Attributes:
        value: its :func:`sample_hash`.
        dtype: its dtype.
        codes: hash of the codes that it was packed into. Of other codes, nothing is known.
    """

    value: int
    dtype: str
    codes: int


class QuantizedModule(SwappedModule):
    """Mixin of modules that hold some of their parameters packed.

    Attributes:
        quantized: the form, shape and dtype of every packed parameter, by its name: a :class:`PackedWeight` without
            tensors.
        origins: what is known of the weight that each packed one was made from, where it had values.
    """

    class_prefix: ClassVar[str] = "Quantized"
    base_attribute: ClassVar[str] = "quantized_base_class"
    form_attributes: ClassVar[tuple[str, ...]] = ("quantized", "origins")  # what a module keeps about its forms
    packs_transpose: ClassVar[bool] = False  # whether packed is the transpose of the parameter

    quantized_base_class: ClassVar[type[nn.Module]]
    quantized: dict[str, PackedWeight]
    origins: dict[str, Origin]

    def stored(self, name: str) -> PackedWeight:
        """Return the packed parameter called ``name``, made of the parts that the module holds."""
        empty = self.quantized[name]
        parts = {part: getattr(self, f"{name}_{part}") for part in type(empty).sizes(empty.shape)}
        return replace(empty, tensors=parts)

    def whole_form(self, name: str) -> PackedWeight:
        """Return the form, shape and dtype of the whole parameter ``name``, of which the module may hold a part."""
        return self.quantized[name]

    @classmethod
    def turn(cls, weight: Tensor) -> Tensor:
        """Return a parameter in the layout in which it is packed, or packed values in the parameter's layout."""
        return weight.t() if cls.packs_transpose else weight

    def part_names(self) -> list[str]:
        """Return the names of the parameters and buffers that packed parameters are made of."""
        return [f"{name}_{part}" for name, one in self.quantized.items() for part in type(one).sizes(one.shape)]

    def state_names(self) -> list[str]:
        """Return the names that packed parameters have in a state dict; other entries have a dot and more behind."""
        return [*self.quantized, *map(scales_name, self.quantized)]

    def turned_entry(self, state_dict: Mapping[str, Any], key: str) -> dict[str, Any]:
        """Return the entry ``key`` of a state dict in the layout that is packed, where it is in another one.

        Codes have that layout, floating-point weights the parameter's.
        """
        weight = state_dict.get(key)
        is_other = self.packs_transpose and weight is not None and weight.is_floating_point() and weight.ndim == 2
        return {key: self.turn(weight)} if is_other else {}  # type: ignore[arg-type]  # a tensor

    def dense_in(self, state_dict: Mapping[str, Any], prefix: str, name: str) -> Tensor:
        """Return the dense value that the parameter ``name`` will have once ``state_dict`` is loaded."""
        stored = self.stored(name)
        entries = {**state_dict, **self.turned_entry(state_dict, prefix + name)}
        parts = read_parts(stored, entries, prefix + name) or stored.tensors
        return self.turn(replace(stored, tensors=parts).dense(stored.dtype))

    def __getattr__(self, name: str) -> Any:
        if name in self.__dict__.get("quantized", ()):
            stored = self.stored(name)
            return self.turn(stored.dense(stored.dtype)) if len(stored.shape) == 2 else PackedStack(stored)
        return super().__getattr__(name)

    @override
    def __setattr__(self, name: str, value: Any) -> None:
        self._check_not_packed(name)
        super().__setattr__(name, value)

    @override
    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        self._check_not_packed(before_pruning(name))
        super().register_parameter(name, param)

    def _check_not_packed(self, name: str) -> None:
        forms = self.__dict__.get("quantized", {})
        if name in forms:
            raise TypeError(
                f"{name!r} of {type(self).__name__} is packed as {forms[name].kind!r} and can be neither assigned nor "
                "pruned: load other values with load_state_dict, or change the weight before the base is quantised, "
                "or leave the layer out with quantize_exclude="
            )

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, empty in self.quantized.items():  # half() and others change the dtype of dense values alone
            dtype = fn(torch.empty(0, dtype=empty.dtype)).dtype
            self.quantized[name] = replace(empty, dtype=dtype)
        return self

    @override
    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self.quantized:
            stored = self.stored(name)
            if any(map(is_sharded, stored.tensors.values())):
                continue  # the parts under their own names: bitsandbytes' keys are of whole weights
            for part in stored.tensors:
                destination.pop(f"{prefix}{name}_{part}", None)
            destination |= state_of(stored, prefix + name)

    @override
    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        for name in self.quantized:
            value = state_dict.get(prefix + name)
            state_dict |= self.turned_entry(state_dict, prefix + name)
            parts = read_parts(self.whole_form(name), state_dict, prefix + name)
            state_dict |= {f"{prefix}{name}_{part}": tensor for part, tensor in parts.items()}
            if not all(_same_values(getattr(self, f"{name}_{part}"), tensor) for part, tensor in parts.items()):
                self.origins.pop(name, None)
            if parts and value.is_floating_point():
                self.origins |= _origin_of(name, value, replace(self.quantized[name], tensors=parts))
        super()._load_from_state_dict(state_dict, prefix, *args)

    @override
    def extra_repr(self) -> str:
        forms = (f"{name}={stored.kind}" for name, stored in self.quantized.items())
        return ", ".join([super().extra_repr(), *forms])


def quantize_parameters(module: nn.Module, names: Mapping[str, str], mixin: type[QuantizedModule]) -> None:
    """Pack parameters of a module in place.

    Args:
        names: the word of ``quantize=``, by the name of each parameter.
    """
    weights = {name: module.get_parameter(name) for name in names}  # with the tag of a part, which detach() loses
    packed = {name: FORMS[kind].quantize(mixin.turn(weights[name].detach())) for name, kind in names.items()}
    origins: dict[str, Origin] = {}
    for name, weight in weights.items():
        origins |= _origin_of(name, weight, packed[name])
    hold(module, packed, mixin, origins)


def _origin_of(name: str, weight: Tensor, packed: PackedWeight) -> dict[str, Origin]:
    if weight.is_meta:
        return {}
    codes = packed.tensors["codes"].view(packed.code_dtype)
    return {name: Origin(int(sample_hash(weight, weight)), dtype_name(weight), int(sample_hash(codes, codes)))}


def _same_values(one: Tensor, other: Tensor) -> bool:
    if one.is_meta or other.is_meta or is_sharded(one) or is_sharded(other):  # the ranks must not judge differently
        return False
    return torch.equal(one, other.to(one.device))


def hold(
    module: nn.Module,
    packed: Mapping[str, PackedWeight],
    mixin: type[QuantizedModule],
    origins: Mapping[str, Origin] | None = None,
) -> None:
    """Put packed weights in the place of the parameters of their names, made from weights of these hashes."""
    swap_class(module, mixin)
    assert isinstance(module, QuantizedModule)
    module.quantized = {}
    module.origins = dict(origins or {})
    for name, stored in packed.items():
        del module._parameters[name]
        module.quantized[name] = replace(stored, tensors={})
        register_parts(module, name, stored)


def dequantize_parameters(module: QuantizedModule) -> None:
    """Put dense parameters in the place of the packed ones, in place."""
    stored = {name: module.stored(name) for name in module.quantized}
    values = {name: module.turn(one.dense(one.dtype)).contiguous() for name, one in stored.items()}
    dense = {name: nn.Parameter(one, requires_grad=False) for name, one in values.items()}
    for name, empty in module.quantized.items():
        for part in type(empty).sizes(empty.shape):
            delattr(module, f"{name}_{part}")
    restore_class(module, *module.form_attributes)
    for name, parameter in dense.items():
        module.register_parameter(name, parameter)
