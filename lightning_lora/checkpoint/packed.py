"""Find the quantised weights of a base: their forms, their codes, and the hash of what they were made from."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_lora.layers.host import Hosted
from lightning_lora.layers.quantized import Origin, QuantizedModule
from lightning_lora.model.merged_model import formers_of
from lightning_lora.model.names import clean_name, joined
from lightning_lora.ops.packed import PackedWeight
from lightning_lora.ops.quantized import stored_as, wraps_tensors
from lightning_lora.ops.sample_hash import dtype_name
from lightning_lora.ops.sharded import is_sharded, local_part


class Packed(NamedTuple):
    """A quantised weight.

    Attributes:
        form: the word of ``quantize=``; of another package's, the type or dtype that it is stored in.
        codes: its codes, or this rank's part of them.
        like: the stored tensor that they are of.
    """

    form: str
    codes: Tensor
    like: Tensor


def packed_weights(root: nn.Module) -> dict[str, Packed]:
    """Return the quantised weights of ``root`` that have values, by the name of the weight."""
    found = {}
    for path, module in root.named_modules():
        if isinstance(module, Hosted):
            continue  # its tensors are those of its host
        if isinstance(module, QuantizedModule):
            for name, empty in module.quantized.items():
                like = getattr(module, f"{name}_codes")
                codes = local_part(like.detach())
                found[joined(clean_name(path), name)] = Packed(empty.kind, codes.view(empty.code_dtype), like)
            continue
        for name, parameter in module._parameters.items():
            if parameter is not None and stored_as(parameter) is not None:
                codes = _codes(local_part(parameter.detach()))
                like = parameter if is_sharded(parameter) else codes
                found[joined(clean_name(path), name)] = Packed(_form(parameter, module), codes, like)
    for name, former in formers_of(root).items():
        stored: Any = former.stored
        if isinstance(stored, PackedWeight):
            form, codes = stored.kind, stored.tensors["codes"].view(stored.code_dtype)
        else:
            form, codes = _form(stored), _codes(stored)
        found[name] = Packed(form, codes, codes)
    return {name: one for name, one in found.items() if not one.codes.is_meta and one.like.numel() > 0}


def origins_of(root: nn.Module) -> dict[str, Origin]:
    """Return what is known of the weights that packed ones were made from, by name."""
    present = {
        joined(clean_name(path), name): origin
        for path, module in root.named_modules()
        if isinstance(module, QuantizedModule) and not isinstance(module, Hosted)
        for name, origin in module.origins.items()
    }
    return present | {name: one.origin for name, one in formers_of(root).items() if one.origin is not None}


def packed_in(fingerprint: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the packed weights of a fingerprint, as ``{name: (form, hash)}``; older ones have none."""
    packed: Mapping[str, Any] = fingerprint.get("packed", {})
    return packed


def _codes(parameter: Tensor) -> Tensor:
    """Return the first plain tensor that a quantised parameter is made of, as integers."""
    while wraps_tensors(parameter):
        parameter = getattr(parameter, parameter.__tensor_flatten__()[0][0])  # type: ignore[attr-defined]
    codes = parameter.detach()
    return codes.view(torch.uint8) if codes.is_floating_point() else codes


def _form(parameter: Any, module: nn.Module | None = None) -> str:
    """Return the name of another package's form: of bitsandbytes' weights that of their codes."""
    state = getattr(parameter, "quant_state", None) or getattr(module, "quant_state", None)  # shards lose the first
    kind: str | None = getattr(state, "quant_type", None)
    if kind is not None:
        return kind
    is_wrapped = wraps_tensors(parameter) and not is_sharded(parameter)
    return type(parameter).__name__ if is_wrapped else dtype_name(parameter)
