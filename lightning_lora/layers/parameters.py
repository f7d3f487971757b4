"""Adapt parameters that a module multiplies by itself: the 3-D tensors of fused experts, a router's matrix."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from typing_extensions import override

from lightning_lora.layers.adapt import become_lora_layer, register_factors
from lightning_lora.layers.base import LoRALayer, Pair
from lightning_lora.layers.factored import FactoredWeight
from lightning_lora.layers.quantized import QuantizedModule
from lightning_lora.ops.packed import PackedWeight
from lightning_lora.ops.packed_stack import PackedStack
from lightning_lora.ops.quantized import check_plain
from lightning_lora.ops.sharded import is_sharded
from lightning_lora.ops.weights import merged_weight


class LoRAParameters(LoRALayer):
    """A module whose adapted parameters read as ``W + scaling * B A``; its products multiply by B and A apart.

    For a parameter ``p`` of shape ``[experts, out, in]`` (``[experts, in, out]`` where the module says
    ``is_transposed``) there are ``lora_A_p`` ``[experts, r, in]`` and ``lora_B_p`` ``[experts, out, r]``; a matrix
    ``[out, in]`` has the pair of a linear layer. There is no dropout: the module reads its weight and multiplies by
    itself.
    """

    lora_parts: dict[str, tuple[int, float]]  # rank and scaling by parameter, in the module's order of parameters

    @property
    def lora_transposed(self) -> bool:
        """Whether 3-D parameters are ``[experts, in, out]``."""
        return bool(self.__dict__.get("is_transposed", getattr(type(self), "is_transposed", False)))

    def __getattr__(self, name: str) -> Any:
        value: Any = super().__getattr__(name)
        if name not in self.__dict__.get("lora_parts", ()) or not self.lora_active or is_sharded(value):
            return value  # also in shards, between forwards: FSDP2 looks for its own parameter here
        pair = self.pairs()[name]
        A, B, scaling = pair.A, pair.B, pair.scaling
        if isinstance(value, PackedStack):
            left, right = (A.transpose(1, 2), B.transpose(1, 2)) if self.lora_transposed else (B, A)
            return value.with_update(left, right, scaling)
        if value.ndim == 3 and self.lora_transposed:
            return FactoredWeight.of(value, A.transpose(1, 2), B.transpose(1, 2), scaling)
        return FactoredWeight.of(value, B, A, scaling)

    @classmethod
    @override
    def adapt_parts(
        cls, modules: Mapping[str, nn.Module], name: str, pairs: Mapping[str, tuple[int, float]], **options: Any
    ) -> "LoRAParameters":
        module, dtype = modules[name], options["dtype"]
        own = own_parameters(module)
        ordered = {part: pairs[part] for part in own if part in pairs}
        sizes = {part: sizes_of_parameter(module, part) for part in ordered}
        names = tuple(f"lora_{factor}_{part}" for part in ordered for factor in "AB")
        adapted = become_lora_layer(
            module, cls, scaling=1.0, dropout=0.0, dtype=dtype, adapter_names=names, lora_parts=ordered
        )
        for part, (r, _) in ordered.items():
            like = own[part]
            experts, in_features, out_features = sizes[part]
            stack = (experts,) if len(like.shape) == 3 else ()
            shapes = {f"lora_A_{part}": (*stack, r, in_features), f"lora_B_{part}": (*stack, out_features, r)}
            register_factors(adapted, like, **shapes)
        return adapted

    @override
    def pairs(self) -> dict[str, Pair]:
        return {
            name: Pair(getattr(self, f"lora_A_{name}"), getattr(self, f"lora_B_{name}"), scaling, r)
            for name, (r, scaling) in self.lora_parts.items()
        }

    @override
    def base_tensors(self) -> dict[str, Tensor | None]:
        return {name: self._parameters.get(name) for name in self.lora_parts}

    @override
    def merged_tensors(self) -> dict[str, Tensor]:
        return {name: self._merged_part(name, pair) for name, pair in self.pairs().items()}

    def _merged_part(self, name: str, pair: Pair) -> Tensor:
        weight: Any = self._parameters[name]
        if weight.ndim == 3 and self.lora_transposed:
            return merged_weight(weight.transpose(1, 2), pair.A, pair.B, pair.scaling).transpose(1, 2)
        return merged_weight(weight, pair.A, pair.B, pair.scaling)


def own_parameters(module: nn.Module) -> dict[str, Tensor | PackedWeight]:
    """Return a base module's own parameters by name, packed ones in the place of their parts."""
    module = module.__dict__.get("lora_host", module)
    found: dict[str, Tensor | PackedWeight] = {n: p for n, p in module._parameters.items() if p is not None}
    if isinstance(module, QuantizedModule):
        for name in module.part_names():
            found.pop(name, None)
        found |= {name: module.stored(name) for name in module.quantized}
    return found


def sizes_of_parameter(module: nn.Module, name: str) -> tuple[int, int, int]:
    """Return ``(experts, in_features, out_features)`` of a parameter; a matrix counts as one expert.

    Raises:
        ValueError: it has other than two or three dimensions, or is quantised.
    """
    parameter = own_parameters(module)[name]
    shape = tuple(parameter.shape)
    if isinstance(parameter, Tensor):
        check_plain(f"parameter {name!r}", parameter)
    elif len(shape) == 2:
        raise ValueError(f"parameter {name!r} is packed as {parameter.kind}: name its layer in target_modules")
    if len(shape) == 2:
        return 1, shape[1], shape[0]
    if len(shape) != 3:
        raise ValueError(f"parameter {name!r} is {list(shape)}; adapted can be matrices and 3-D stacks of them")
    first, second = shape[1:]
    return (shape[0], first, second) if getattr(module, "is_transposed", False) else (shape[0], second, first)
