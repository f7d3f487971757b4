"""Give the adapters of a Megatron-core model Hugging Face's names: build a skeleton of that model, adapted alike."""

from typing import Any

import torch
from torch import nn

from lightning_lora.layers import adapt
from lightning_lora.layers.linear import LoRALinear
from lightning_lora.megatron.layers import LoRAMegatronLinear
from lightning_lora.megatron.names import megatron_parts
from lightning_lora.model.families import name_or_path
from lightning_lora.model.layer_plan import Plan
from lightning_lora.model.state import Injection, named_lora_layers, named_trained_whole, require_injection


class Skeleton(nn.Module):
    """The linear layers of Hugging Face's model under their names, without values; of the rest nothing."""

    config: Any = None


def skeleton(model: nn.Module) -> Skeleton:
    """Return the linear layers of a ``GPTModel``, part by part, as ``nn.Linear`` on meta under Hugging Face's names."""
    root = Skeleton()
    for parts in megatron_parts(model).values():
        for part in parts:
            assert part.features is not None
            _put(root, part.name, nn.Linear(*part.features, bias=False, device="meta"))
    return root


def adapted_view(model: nn.Module) -> tuple[Skeleton, dict[str, tuple[str, str]]]:
    """Return a skeleton that is adapted as ``model`` is, and how each of its tensors is made from the model's.

    Returns:
        The skeleton, whose adapters hold zeros; and ``{name in it: (layout, name in the model)}``, for
        :func:`~lightning_lora.peft.layout.laid_out`.

    Raises:
        ValueError: what trains has no name in Hugging Face's model.
    """
    injection = require_injection(model)
    whole = list(named_trained_whole(model))
    if whole:
        raise ValueError(
            f"{whole[0]!r} of {type(model).__name__} trains whole, which has no place in a PEFT directory of a "
            "Megatron-core model: leave it out of modules_to_save, or keep the adapter in checkpoints"
        )
    view, sources = skeleton(model), dict[str, tuple[str, str]]()
    dtype = None if injection.config.adapter_dtype == "auto" else getattr(torch, injection.config.adapter_dtype)
    known = megatron_parts(model)
    for name, layer in named_lora_layers(model).items():
        assert isinstance(layer, LoRAMegatronLinear)
        pairs = layer.pairs()
        for part in known[name]:
            pair = pairs.get(part.local) or pairs.get("")
            if pair is None:
                continue
            if part.name == name or part.name.startswith(f"{name}."):
                raise ValueError(f"{name!r} has no name in a Hugging Face model: keep the adapter in checkpoints")
            linear = view.get_submodule(part.name)
            adapt(linear, LoRALinear, r=pair.r, scaling=pair.scaling, dropout=layer.lora_dropout, dtype=dtype)
            local = f"_{part.local}" if part.local in pairs and part.local else ""
            sources[f"{part.name}.lora_A"] = ("plain", f"{name}.lora_A{local}")
            stack = layer.lora_stack
            rows = "plain" if local or stack is None else "rows_" + "_".join(map(str, stack.place(part.local)))
            sources[f"{part.name}.lora_B"] = (rows, f"{name}.lora_B{local}")
    view.lora_injection = Injection(Plan(injection.config))  # type: ignore[assignment]  # a plain attribute
    view.config = type("Config", (), {"name_or_path": name_or_path(model)})()
    return view, sources


def _put(root: nn.Module, name: str, module: nn.Module) -> None:
    *path, last = name.split(".")
    for part in path:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    root.add_module(last, module)
