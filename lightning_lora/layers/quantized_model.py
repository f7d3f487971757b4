"""Ask a whole model about its packed parameters: are there any, how many, and does a state dict fit them."""

from collections.abc import Mapping
from typing import Any

from torch import nn
from typing_extensions import TypeIs

from lightning_lora.layers.host import Hosted
from lightning_lora.layers.quantized import QuantizedModule
from lightning_lora.layers.quantized_state import check_entries, unknown_entries
from lightning_lora.ops.sharded import logical


def check_state(
    model: nn.Module, state_dict: Mapping[str, Any], prefix: str, metadata: Any, strict: bool, *_: Any
) -> None:
    """Check the packed weights of a state dict before ``load_state_dict`` copies anything: a hook of the model.

    Raises:
        ValueError: an entry does not fit, or with ``strict`` a weight is missing or an entry is left over.
    """
    missing, known = [], set()
    for path, module in model.named_modules():
        for name in module.quantized if _holds_packed(module) else ():
            key = f"{prefix}{path}.{name}" if path else prefix + name
            known.add(key)
            if key in state_dict:
                check_entries(module.whole_form(name), {**state_dict, **module.turned_entry(state_dict, key)}, key)
            elif f"{key}_codes" not in state_dict:  # of shards
                missing.append(key)
    if missing and strict:
        raise ValueError(
            f"the state dict lacks {len(missing)} quantised weights, {missing[0]!r} the first: is the file truncated? "
            "Load all files of the checkpoint"
        )
    unknown = unknown_entries(known, state_dict) if strict else ()
    if unknown:
        raise ValueError(
            f"the state dict has {unknown[0]!r} ({len(unknown)} such entries), which belongs to no packed weight in "
            "bitsandbytes' keys: was it quantised in another way? Load the floating-point weights, or take them out"
        )


def is_quantised(model: nn.Module) -> bool:
    """Whether any module of a model holds packed parameters."""
    return any(isinstance(module, QuantizedModule) for module in model.modules())


def num_parameters(model: nn.Module) -> int:
    """Return the number of a model's parameters, where a packed one counts as the weight that it stands for."""
    holders = [module for module in model.modules() if _holds_packed(module)]
    parts = {id(getattr(module, name)) for module in holders for name in module.part_names()}
    packed = sum(stored.shape.numel() for module in holders for stored in module.quantized.values())
    return packed + sum(int(logical(p).numel()) for p in model.parameters() if id(p) not in parts)


def _holds_packed(module: nn.Module) -> TypeIs[QuantizedModule]:
    """Return True for a module that packs parameters itself: a named adapter has the class of its host."""
    return isinstance(module, QuantizedModule) and not isinstance(module, Hosted)
