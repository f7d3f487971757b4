"""Refuse a merge that would change another layer, or after which a layer would compute something else."""

from collections import defaultdict
from collections.abc import Mapping

from torch import Tensor, nn

from lightning_lora.layers import LoRALayer
from lightning_lora.layers.plain_weight import stored_kind, stored_names, weight_shape
from lightning_lora.layers.token_rows import TokenRows
from lightning_lora.model.merge_layer import Into, merge_values, other_stored
from lightning_lora.model.merge_receipt import MergeReceipt
from lightning_lora.model.merged_model import unmerged_layers
from lightning_lora.model.names import clean_name, joined
from lightning_lora.model.original_base import OriginalBase, open_original
from lightning_lora.model.spread import gathered
from lightning_lora.model.state import first_nonfinite
from lightning_lora.ops.packed import FORMS
from lightning_lora.ops.quantized import stored_as
from lightning_lora.ops.sharded import is_sharded, local_part


def check_merge(model: nn.Module, root: nn.Module, into: Into) -> None:
    """Raise ``ValueError`` for adapters of ``root``, inside ``model``, that cannot be merged into ``into``."""
    layers = unmerged_layers(root, into.adapter)
    check_mergeable(model, layers)
    _check_into(root, into)
    with open_original(root, into.base) as original:
        if original is not None:
            original.check(_shapes(root, layers))
        if into.requantize is not None:
            _check_kept(layers, into, original)


def _check_into(root: nn.Module, into: Into) -> None:
    if into.dtype is not None and not getattr(into.dtype, "is_floating_point", False):
        raise ValueError(f"dtype={into.dtype!r} is no floating-point dtype of torch")
    if into.dtype is not None and any(map(is_sharded, root.parameters())):
        raise ValueError("dtype: a base in shards keeps its dtype; merge in one process, with load_peft")
    spread = [
        n for n, m in root.named_modules() if stored_names(m) and any(map(is_sharded, m.parameters(recurse=False)))
    ]
    if spread:
        raise ValueError(
            f"cannot merge {spread[0]!r}: it is quantised and in shards. Call save_peft, and in one process merge into "
            "what load_peft(base, directory) returns"
        )
    if into.requantize is None:
        return
    if into.requantize not in FORMS:
        raise ValueError(f"requantize must be one of {', '.join(map(repr, FORMS))}, got {into.requantize!r}")
    stored = [(m, name) for m in root.modules() for name in stored_names(m)]
    if not stored:
        raise ValueError(
            f"requantize={into.requantize!r}: no weight of {type(root).__name__} is quantised. Merge, and then call "
            "quantize(model, kind)"
        )


def _shapes(root: nn.Module, layers: Mapping[str, LoRALayer]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the weights that are read from original files, by name."""
    names = {id(module): clean_name(name) for name, module in root.named_modules()}
    wanted = [(layer.base_layer, local) for layer in layers.values() for local in layer.base_tensors()]
    return {
        joined(names[id(module)], local): tuple(weight_shape(module, local))
        for module, local in [*wanted, *other_stored(root)]
    }


def _check_kept(layers: Mapping[str, LoRALayer], into: Into, original: OriginalBase | None) -> None:
    quantised = {n: one for n, one in layers.items() if any(stored_kind(one, local) for local in one.base_tensors())}
    receipts = [merge_values(name, layer, into, original)[1] for name, layer in quantised.items()]
    total = MergeReceipt(str(into.base), tuple(receipts)).total
    if total.kept < 0.5:
        worst = min(receipts, key=lambda one: one.kept)
        raise ValueError(
            f"requantize={into.requantize!r} would keep {100 * total.kept:.1f} % of the update, and of {worst.name!r} "
            f"{100 * worst.kept:.1f} %: the update is smaller than the steps of that form. Merge without requantize, "
            "into plain weights, or over the original ones: base='path/of/the/base'"
        )


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
        for local, weight in layer.base_tensors().items():
            if stored_kind(layer, local) is None:
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
        if p is not None and module is not layer.base_layer and p.numel() > 0 and _overlap(p, weight)
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
