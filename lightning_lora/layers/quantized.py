""":class:`QuantizedModule` holds parameters packed in 4 or 8 bits.

A packed parameter is no parameter of its module any more: the module holds its parts, ``weight_codes``,
``weight_scales`` and others, and reading ``weight`` returns a dense copy, of a matrix, or a :class:`PackedStack`. The
state dict has bitsandbytes' keys.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_lora.layers.class_swap import SwappedModule, restore_class, swap_class
from lightning_lora.layers.quantized_state import check_entries, read_parts, scales_name, state_of
from lightning_lora.ops.packed import FORMS, PackedWeight
from lightning_lora.ops.packed_stack import PackedStack
from lightning_lora.ops.sample_hash import dtype_name, sample_hash
from lightning_lora.ops.sharded import is_sharded, logical

ROW_PARTS = ("codes", "scales")  # parts whose first dimension counts blocks: FSDP2 shards them


class QuantizedModule(SwappedModule):
    """Mixin of modules that hold some of their parameters packed.

    Attributes:
        quantized: the form, shape and dtype of every packed parameter, by its name: a :class:`PackedWeight` without
            tensors.
        origins: the :func:`sample_hash` and the dtype of the weight that each packed one was made from, where it had
            values.
    """

    class_prefix: ClassVar[str] = "Quantized"
    base_attribute: ClassVar[str] = "quantized_base_class"
    form_attributes: ClassVar[tuple[str, ...]] = ("quantized", "origins")  # what a module keeps about its forms
    packs_transpose: ClassVar[bool] = False  # whether packed is the transpose of the parameter

    quantized_base_class: ClassVar[type[nn.Module]]
    quantized: dict[str, PackedWeight]
    origins: dict[str, tuple[int, str]]

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
                self.origins |= _origin_of(name, value)
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
    origins: dict[str, tuple[int, str]] = {}
    for name in names:
        origins |= _origin_of(name, module.get_parameter(name))
    packed = {name: FORMS[kind].quantize(mixin.turn(module.get_parameter(name))) for name, kind in names.items()}
    hold(module, packed, mixin, origins)


def _origin_of(name: str, weight: Tensor) -> dict[str, tuple[int, str]]:
    return {} if weight.is_meta else {name: (int(sample_hash(weight, weight)), dtype_name(weight))}


def _same_values(one: Tensor, other: Tensor) -> bool:
    if one.is_meta or other.is_meta or is_sharded(one) or is_sharded(other):  # the ranks must not judge differently
        return False
    return torch.equal(one, other.to(one.device))


def hold(
    module: nn.Module,
    packed: Mapping[str, PackedWeight],
    mixin: type[QuantizedModule],
    origins: Mapping[str, tuple[int, str]] | None = None,
) -> None:
    """Put packed weights in the place of the parameters of their names, made from weights of these hashes."""
    swap_class(module, mixin)
    assert isinstance(module, QuantizedModule)
    module.quantized = {}
    module.origins = dict(origins or {})
    for name, stored in packed.items():
        del module._parameters[name]
        module.quantized[name] = replace(stored, tensors={})
        for part, tensor in stored.tensors.items():
            if part in ROW_PARTS:
                module.register_parameter(f"{name}_{part}", nn.Parameter(tensor, requires_grad=False))
            else:
                module.register_buffer(f"{name}_{part}", tensor)


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


def check_state(
    model: nn.Module, state_dict: Mapping[str, Any], prefix: str, metadata: Any, strict: bool, *_: Any
) -> None:
    """Check the packed weights of a state dict before ``load_state_dict`` copies anything: a hook of the model.

    Raises:
        ValueError: an entry does not fit, or with ``strict`` a weight is missing.
    """
    missing = []
    for path, module in model.named_modules():
        for name in module.quantized if isinstance(module, QuantizedModule) else ():
            key = f"{prefix}{path}.{name}" if path else prefix + name
            if key in state_dict:
                check_entries(module.whole_form(name), {**state_dict, **module.turned_entry(state_dict, key)}, key)
            elif f"{key}_codes" not in state_dict:  # of shards
                missing.append(key)
    if missing and strict:
        raise ValueError(
            f"the state dict lacks {len(missing)} quantised weights, {missing[0]!r} the first: is the file truncated? "
            "Load all files of the checkpoint"
        )


def num_parameters(model: nn.Module) -> int:
    """Return the number of a model's parameters, where a packed one counts as the weight that it stands for."""
    holders = [module for module in model.modules() if isinstance(module, QuantizedModule)]
    parts = {id(getattr(module, name)) for module in holders for name in module.part_names()}
    packed = sum(stored.shape.numel() for module in holders for stored in module.quantized.values())
    return packed + sum(int(logical(p).numel()) for p in model.parameters() if id(p) not in parts)
