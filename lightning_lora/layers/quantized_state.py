"""Packed weights in a state dict: bitsandbytes' keys, which transformers, PEFT and vLLM read.

Of a weight called ``M.weight`` in 4 bits: ``M.weight`` (the codes, ``[n / 2, 1]``), ``M.weight.absmax`` (the scales),
``M.weight.quant_map`` (the values of the codes), with double quantisation ``M.weight.nested_absmax`` and
``M.weight.nested_quant_map``, and ``M.weight.quant_state.bitsandbytes__nf4``: JSON as bytes. In 8 bits: ``M.weight``
(int8) and ``M.SCB`` (the scales).
"""

import json
from collections.abc import Collection, Mapping, MutableMapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_lora.ops.four_bit import BLOCK, BYTES, CODES, SCALES_BLOCK, code_values, dynamic_levels, num_blocks
from lightning_lora.ops.packed import FORMS, NF4, Int8, NF4Double, PackedWeight, as_bytes, floats

STATE = "quant_state.bitsandbytes__"
_ENTRIES = ["absmax", "quant_map", "nested_absmax", "nested_quant_map", *(f"{STATE}{code}" for code in CODES)]
ZERO_CODES = 0x77  # two codes of the value 0 in NF4


def state_of(stored: PackedWeight, name: str) -> dict[str, Tensor]:
    """Return the entries of a packed weight called ``name``."""
    parts = stored.tensors
    if isinstance(stored, Int8):
        codes = parts["codes"].view(torch.int8).view(stored.shape)
        return {name: codes, scales_name(name): floats(parts["scales"])}
    numel, device = stored.shape.numel(), stored.device
    entries = {
        name: parts["codes"].reshape(-1, 1)[: -(-numel // 2)],
        f"{name}.quant_map": code_values("nf4", device).clone(),
    }
    facts: dict[str, Any] = {
        "quant_type": "nf4",
        "blocksize": BLOCK,
        "dtype": str(stored.dtype).removeprefix("torch."),
        "shape": list(stored.shape),
    }
    if isinstance(stored, NF4Double):
        entries[f"{name}.absmax"] = parts["scales"].view(-1)
        entries[f"{name}.nested_absmax"] = floats(parts["nested"])
        entries[f"{name}.nested_quant_map"] = dynamic_levels(device).clone()
        facts |= {"nested_blocksize": SCALES_BLOCK, "nested_dtype": "float32"}
        facts["nested_offset"] = floats(parts["offset"][None]).item() if device.type != "meta" else 0.0
    else:
        entries[f"{name}.absmax"] = floats(parts["scales"])
    text = torch.tensor(list(json.dumps(facts).encode()), dtype=torch.uint8)
    return entries | {f"{name}.{STATE}nf4": text}


def scales_name(name: str) -> str:
    """Return bitsandbytes' name of an 8-bit weight's scales: ``SCB`` beside ``weight``."""
    module, _, local = name.rpartition(".")
    own = "SCB" if local == "weight" else f"{local}.SCB"
    return f"{module}.{own}" if module else own


def read_parts(empty: PackedWeight, state: MutableMapping[str, Any], name: str) -> Mapping[str, Tensor]:
    """Take the entries of a weight called ``name`` out of a state dict and return its parts.

    A floating-point weight is quantised. Nothing is returned where the state dict holds nothing of the weight.

    Raises:
        ValueError: the entries are of another form, block size, code or shape, or some are missing.
    """
    weight = state.pop(name, None)
    if weight is None:
        return {}
    if weight.is_floating_point():
        if weight.shape != empty.shape:
            raise ValueError(_refusal(name, f"its shape is {list(weight.shape)}", f"{list(empty.shape)}"))
        return _finite(type(empty).quantize(weight), name).tensors
    kind, words = _form_in(state, name, weight)
    if kind != empty.kind:
        raise ValueError(_other_form(name, words, empty.kind, kind))
    if isinstance(empty, Int8):
        parts = {"codes": weight, "scales": state.pop(scales_name(name), None)}
        state.pop(f"{name}_format", None)
        if parts["scales"] is None:
            raise ValueError(_refusal(name, "it has no scales", "them as SCB"))
        if weight.shape != empty.shape:
            raise ValueError(_refusal(name, f"its shape is {list(weight.shape)}", f"{list(empty.shape)}"))
        codes = weight.view(torch.uint8).flatten(0, -2)
        return _checked(empty, {"codes": codes, "scales": as_bytes(parts["scales"])}, name)
    return _checked(empty, _four_bit_parts(empty, weight, state, name), name)


def check_entries(empty: PackedWeight, state: Mapping[str, Any], name: str) -> None:
    """Raise ``ValueError`` where :func:`read_parts` would, and take nothing out of the state dict."""
    weight = state[name]
    if weight.is_floating_point() and weight.shape == empty.shape:
        if not weight.is_meta and not bool(torch.isfinite(weight).all()):
            raise ValueError(_not_finite(name))
        return
    keys = [name, scales_name(name), *(f"{name}.{entry}" for entry in _ENTRIES)]
    read_parts(empty, {key: state[key] for key in keys if key in state}, name)


def unknown_entries(names: Collection[str], state: Mapping[str, Any]) -> list[str]:
    """Return the entries below packed weights of these names that are none of bitsandbytes'."""
    owners = ((key, *key.rpartition(".")[::2]) for key in state)
    return [key for key, owner, entry in owners if owner in names and entry not in (*_ENTRIES, "SCB")]


def _four_bit_parts(
    empty: PackedWeight, weight: Tensor, state: MutableMapping[str, Any], name: str
) -> dict[str, Tensor]:
    entries = {entry: state.pop(f"{name}.{entry}") for entry in _ENTRIES if f"{name}.{entry}" in state}
    facts = json.loads(bytes(entries[f"{STATE}nf4"].tolist()))
    if facts.get("shape") != list(empty.shape):
        raise ValueError(_refusal(name, f"its shape is {facts.get('shape')}", f"{list(empty.shape)}"))
    numel = empty.shape.numel()
    if weight.numel() != -(-numel // 2):
        raise ValueError(_refusal(name, f"it has {weight.numel()} bytes of codes", f"{-(-numel // 2)}"))
    blocks = num_blocks(numel)
    codes = torch.nn.functional.pad(weight.reshape(-1), (0, blocks * BYTES - weight.numel()), value=ZERO_CODES)
    parts = {"codes": codes.view(-1, BYTES), "scales": entries.get("absmax")}
    if isinstance(empty, NF4Double):
        offset = torch.tensor([facts["nested_offset"]], dtype=torch.float32)
        parts |= {"nested": as_bytes(entries["nested_absmax"]), "offset": as_bytes(offset)[0]}
        parts["scales"] = None if parts["scales"] is None else parts["scales"][:, None]
    elif parts["scales"] is not None:
        parts["scales"] = as_bytes(parts["scales"])
    return {part: tensor for part, tensor in parts.items() if tensor is not None}


def _checked(empty: PackedWeight, parts: Mapping[str, Tensor], name: str) -> Mapping[str, Tensor]:
    sizes = type(empty).sizes(empty.shape)
    found = {part: tuple(tensor.shape) for part, tensor in parts.items()}
    if found != sizes:
        raise ValueError(_refusal(name, f"its parts have the shapes {found}", f"{sizes}"))
    return parts if parts["codes"].is_meta else _finite(replace(empty, tensors=parts), name).tensors


def _finite(stored: PackedWeight, name: str) -> PackedWeight:
    if not stored.is_finite():
        raise ValueError(_not_finite(name))
    return stored


def _not_finite(name: str) -> str:
    return f"{name!r} holds NaN or infinity, which cannot be quantised: load a base without them"


def _form_in(state: Mapping[str, Any], name: str, weight: Tensor) -> tuple[str | None, str]:
    """Return the word of ``quantize=`` for a packed weight in a state dict, or ``None``; and what it is, in words."""
    if weight.dtype == torch.int8:
        return Int8.kind, repr(Int8.kind)
    described = [key for code in CODES if (key := f"{name}.{STATE}{code}") in state]
    if weight.dtype != torch.uint8 or not described:
        return None, f"{weight.dtype} and has no quantisation state"
    facts, is_double = json.loads(bytes(state[described[0]].tolist())), f"{name}.nested_absmax" in state
    wanted = {"quant_type": "nf4", "blocksize": BLOCK} | ({"nested_blocksize": SCALES_BLOCK} if is_double else {})
    other = {key: facts.get(key) for key, value in wanted.items() if facts.get(key) != value}
    if other:
        return None, f"in another form: its state says {other}"
    kind = NF4Double.kind if is_double else NF4.kind
    return kind, repr(kind)


def _other_form(name: str, given: str, kind: str, fitting: str | None) -> str:
    """Return the refusal of a weight in another form; ``fitting`` is the word of ``quantize=`` for it."""
    fits = "No word of quantize= has this form" if fitting is None else f"Quantise the model with quantize={fitting!r}"
    return (
        f"{name!r} cannot be loaded into a quantised layer: the file is {given}, the model is {kind!r}. {fits}"
        f"{':' if fitting is None else ', or'} load the floating-point weight"
    )


def _refusal(name: str, given: str, expected: str) -> str:
    kinds = ", ".join(map(repr, FORMS))
    return (
        f"{name!r} cannot be loaded into a quantised layer: {given}, expected {expected}. Load it into a model "
        f"that was quantised in the same way (quantize= one of {kinds}), or load the floating-point weight"
    )
