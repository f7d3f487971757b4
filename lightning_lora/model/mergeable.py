"""Refuse a merge that would change another layer, or after which a layer would compute something else."""

from collections import defaultdict
from collections.abc import Mapping

from torch import Tensor, nn

from lightning_lora.layers import LoRALayer
from lightning_lora.layers.token_rows import TokenRows
from lightning_lora.model.spread import gathered
from lightning_lora.model.state import first_nonfinite
from lightning_lora.ops.quantized import stored_as
from lightning_lora.ops.sharded import local_part


def check_mergeable(model: nn.Module, layers: dict[str, LoRALayer]) -> None:
    """Raise ``ValueError`` for the first of ``layers``, by name, that cannot be merged into its base weight."""
    holders: defaultdict[int, list[Tensor]] = defaultdict(list)
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None and parameter.numel() > 0:
                holders[_storage(parameter)].append(parameter)
    for name, layer in layers.items():
        if not layer.lora_active:
            raise ValueError(f"cannot merge {name!r} inside disabled(model): leave the block first")
        for weight in layer.base_tensors().values():
            _check_writable(model, name, layer, weight, holders)
        with gathered(layer):
            if first_nonfinite(dict(layer.named_adapter_tensors())) is not None:
                raise ValueError(f"cannot merge {name!r}: its adapter holds NaN or infinity (a diverged run?)")
            obstacle = layer.merge_obstacle()
        if obstacle is not None:
            raise ValueError(f"cannot merge {name!r}: {obstacle}")


def _check_writable(
    model: nn.Module, name: str, layer: LoRALayer, weight: Tensor | None, holders: Mapping[int, list[Tensor]]
) -> None:
    """Raise ``ValueError`` for a base tensor that a merge cannot write, or that belongs to another layer too."""
    if weight is None:
        raise ValueError(
            f"cannot merge {name!r}: {layer.base_name!r} is not a stored parameter of it: it is computed "
            "(weight_norm, parametrize), or the layer's mixin lacks base_name"
        )
    if weight.device.type == "meta":
        raise ValueError(f"cannot merge {name!r}: its weight is on the meta device; load the base first")
    if not weight.is_floating_point():
        raise ValueError(f"cannot merge {name!r}: its weight is quantised ({weight.dtype})")
    if sum(_overlap(weight, other) for other in holders[_storage(weight)]) <= 1:
        return
    twins = {
        other: module
        for other, module in model.named_modules()
        for p in module._parameters.values()
        if p is not None and module is not layer and p.numel() > 0 and _overlap(p, weight)
    }
    if isinstance(layer, TokenRows) and all(isinstance(m, TokenRows) for m in twins.values()):
        return  # they share the rows as well
    raise ValueError(
        f"cannot merge {name!r}: its weight is tied to {', '.join(twins)}, which would change too. "
        "Keep the adapter unmerged, or untie the weights first"
    )


def _storage(tensor: Tensor) -> int:
    """Return the address of a tensor's storage, or its identity where it has none, as quantised ones do."""
    if stored_as(tensor) is not None:
        return id(tensor)
    return local_part(tensor).untyped_storage().data_ptr() or id(tensor)


def _overlap(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are tied: pieces of one buffer, as a flat optimizer makes them, are not."""
    if one is other or _storage(one) != _storage(other):
        return one is other
    (start, end), (first, last) = _span(one), _span(other)
    return start < last and first < end


def _span(tensor: Tensor) -> tuple[int, int]:
    """Return where a tensor's memory begins and where it ends."""
    part = local_part(tensor)
    reach = 1 + sum((size - 1) * stride for size, stride in zip(part.shape, part.stride(), strict=True))
    return part.data_ptr(), part.data_ptr() + reach * part.element_size()
