"""Merge the layers of one model, and keep what is needed to undo it."""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.layers import LoRALayer
from lightning_lora.layers.acting import UNDECIDED, Undecided
from lightning_lora.layers.base import convert_parameter
from lightning_lora.layers.plain_weight import Former, dense_weight, put_packed, put_plain, stored_kind
from lightning_lora.layers.trained import KeptWide
from lightning_lora.model.base_form import QuantizationPlan, quantization_of
from lightning_lora.model.hosts import follow_bases
from lightning_lora.model.merge_layer import Into, Merged, as_stored, merge_values, other_stored
from lightning_lora.model.merge_receipt import LayerReceipt
from lightning_lora.model.names import clean_name, joined
from lightning_lora.model.original_base import OriginalBase, open_original
from lightning_lora.model.state import named_lora_layers, require_injection
from lightning_lora.ops.packed import PackedWeight
from lightning_lora.ops.sharded import local_part, write

_QUANTIZER = ("hf_quantizer", "quantization_method", "is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit")


@dataclass
class MergedModel:
    """Changes of one merge.

    Attributes:
        into: what was merged into.
        formers: weights that were stored in another form and have no adapter.
        cast: frozen parameters that were cast, with their values, on CPU.
        read_as: the dtypes that modules read their trained parameters in.
        attributes: what transformers notes on a quantised model, as ``(object, name, value)``.
    """

    into: Into
    formers: list[Former] = field(default_factory=list)
    cast: list[tuple[nn.Parameter, Tensor]] = field(default_factory=list)
    read_as: list[tuple[Any, dict[str, torch.dtype]]] = field(default_factory=list)
    attributes: list[tuple[Any, str, Any]] = field(default_factory=list)

    def undo(self) -> None:
        """Give back what was changed."""
        for former in reversed(self.formers):
            former.put_back()
        for parameter, values in self.cast:
            parameter.data = values.to(parameter.device)
        for module, dtypes in self.read_as:
            module.__dict__["_lora_read_dtypes"] = dtypes
        for owner, name, value in self.attributes:
            owner.__dict__[name] = value


def form_before_merge(model: nn.Module) -> QuantizationPlan | None:
    """Return what :func:`quantize` did to an adapted model, whether it is merged or not."""
    state = require_injection(model).merged
    noted = {} if state is None else {name: value for _, name, value in state.attributes}
    return noted.get("lora_quantization", quantization_of(model))


def unmerged_layers(root: nn.Module, adapter: str | None) -> dict[str, LoRALayer]:
    """Return the adapted layers whose adapters are not merged, by the names of their bases.

    Args:
        adapter: the name of the adapter; of a model whose adapters have names and one is merged, none is left.

    Raises:
        ValueError: there is no adapter of this name, or there are several and none was named.
    """
    injection = require_injection(root)
    layers = {name: layer for name, layer in named_lora_layers(root).items() if layer.lora_original is None}
    if not injection.named and adapter is None:
        return layers
    known = list(injection.named)
    if adapter is None and len(known) > 1:
        raise ValueError(f"{type(root).__name__} has {len(known)} adapters: give adapter=, one of {', '.join(known)}")
    if adapter is not None and adapter not in known:
        there = ", ".join(map(repr, known)) or "one without a name"
        raise ValueError(f"there is no adapter {adapter!r}: {type(root).__name__} has {there}")
    if injection.merged is not None:
        return {}
    if not isinstance(injection.choice.chosen, Undecided):
        raise ValueError("an adapter cannot be merged inside active(model, ...): leave that block first")
    suffix = f".lora.{adapter or known[0]}"
    return {name.removesuffix(suffix): layer for name, layer in layers.items() if name.endswith(suffix)}


def merge_layers(root: nn.Module, into: Into) -> list[LayerReceipt]:
    """Merge all layers of a root that was checked, and note on it what :func:`unmerge_layers` gives back."""
    state, kept = MergedModel(into), dict[int, Tensor]()
    with open_original(root, into.base) as original:
        receipts = []
        for name, layer in unmerged_layers(root, into.adapter).items():
            values, receipt = merge_values(name, layer, into, original)
            _write(layer, values, kept)
            receipts.append(receipt)
        _make_others_plain(root, into, state, original)
    if into.dtype is not None:
        adapters = {id(p) for layer in named_lora_layers(root).values() for _, p in layer.named_adapter_tensors()}
        _cast_others(root, state, into.dtype, adapters | kept.keys())
    _note_form(root, into, state)
    injection = require_injection(root)
    injection.merged = state
    if injection.named:
        injection.choice.chosen = None  # the base acts
        follow_bases(root)
    return receipts


def unmerge_layers(root: nn.Module, state: MergedModel) -> None:
    """Give the weights of all layers back, bit for bit, and undo what else a merge changed."""
    for layer in named_lora_layers(root).values():
        for name, original in reversed((layer.lora_original or {}).items()):
            if isinstance(original, Former):
                original.put_back()
                continue
            parameter = layer.base_layer.get_parameter(name)
            if state.into.dtype is not None:
                convert_parameter(parameter, original.dtype)
            write(parameter, original)
        if layer.lora_original is not None:
            layer.lora_original, layer.lora_active = None, True
    require_injection(root).choice.chosen = UNDECIDED
    state.undo()
    follow_bases(root)


def _write(layer: LoRALayer, values: dict[str, Merged], kept: dict[int, Tensor]) -> None:
    """Write merged weights into a layer; ``kept`` holds the tensors merged so far, of which layers may share one."""
    originals: dict[str, Tensor | Former] = {}
    for name, value in reversed(values.items()):  # each is put before those that a module has
        if isinstance(value, PackedWeight):
            originals[name] = put_packed(layer.base_layer, name, value)
        elif stored_kind(layer, name) is not None:
            originals[name] = put_plain(layer.base_layer, name, value)
        else:
            weight = layer._parameters[name]
            assert weight is not None
            if id(weight) not in kept:
                kept[id(weight)] = local_part(weight.detach()).to("cpu", copy=True)
                if value.dtype != weight.dtype:
                    convert_parameter(weight, value.dtype)
                write(weight, value)
            originals[name] = kept[id(weight)]
    layer.lora_original, layer.lora_active = originals, False


def _make_others_plain(root: nn.Module, into: Into, state: MergedModel, original: OriginalBase | None) -> None:
    """Store the quantised weights that have no adapter as merged ones are stored."""
    names = {id(module): clean_name(name) for name, module in root.named_modules()}
    for module, name in other_stored(root):
        kind, dtype = into.form(module, name)
        if original is not None:
            values = original.read(joined(names[id(module)], name)).to(dense_weight(module, name))
        elif kind is None:
            values = dense_weight(module, name)
        else:
            continue  # it is stored as it was trained over
        stored, _ = as_stored(values, kind, dtype)
        put = put_packed if isinstance(stored, PackedWeight) else put_plain
        state.formers.append(put(module, name, stored))  # type: ignore[arg-type]  # each takes its own


def formers_of(root: nn.Module) -> dict[str, Former]:
    """Return by name the weights in whose place others stand while a root is merged, as they were stored."""
    state = require_injection(root).merged
    own = [one for layer in named_lora_layers(root).values() for one in (layer.lora_original or {}).values()]
    formers = [one for one in own if isinstance(one, Former)] + ([] if state is None else state.formers)
    names = {id(module): clean_name(name) for name, module in root.named_modules()}
    return {joined(names[id(one.module)], one.name): one for one in formers}


def _cast_others(root: nn.Module, state: MergedModel, dtype: torch.dtype, left: set[int]) -> None:
    """Cast the frozen parameters of a model to ``dtype`` in place, and let those that train be read in it.

    Args:
        left: identities of the parameters to leave out.
    """
    for parameter in root.parameters():
        is_cast = parameter.is_floating_point() and not parameter.requires_grad and parameter.dtype != dtype
        if is_cast and id(parameter) not in left:
            state.cast.append((parameter, parameter.detach().to("cpu", copy=True)))
            parameter.data = parameter.data.to(dtype)
    for module in root.modules():
        if isinstance(module, KeptWide) and "_lora_read_dtypes" in module.__dict__:
            dtypes = module._lora_read_dtypes
            state.read_as.append((module, dtypes))
            module.__dict__["_lora_read_dtypes"] = dict.fromkeys(dtypes, dtype)


def _note_form(root: nn.Module, into: Into, state: MergedModel) -> None:
    """Take off the notes that a model is quantised, so that ``save_pretrained`` writes a plain one, or change them."""
    plan = quantization_of(root)
    if plan is not None:
        state.attributes.append((root, "lora_quantization", root.__dict__.pop("lora_quantization")))
    if into.requantize is not None:
        if plan is not None:
            root.__dict__["lora_quantization"] = replace(plan, kind=into.requantize)
        return
    for module in root.modules():
        if "hf_quantizer" in module.__dict__:
            config: Any = module.config
            for owner, names in ((module, _QUANTIZER), (config, ("quantization_config",))):
                state.attributes += [(owner, n, owner.__dict__.pop(n)) for n in names if n in owner.__dict__]
