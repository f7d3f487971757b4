"""What Megatron-core's layers are called in Hugging Face's models, part by part: both names are understood."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_lora.layers.megatron import Stack, has_megatron, is_parallel_linear, stack_of
from lightning_lora.root import clean_name, is_megatron

# (end of Megatron-core's name inside a block, {part: end of Hugging Face's})
_ATTENTION = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj"}
_BLOCK = re.compile(r"(?P<before>.*\.|)decoder\.layers\.(?P<index>\d+)\.(?P<inside>.+)")


@dataclass(frozen=True)
class Part:
    """A weight of its own inside a layer of Megatron-core.

    Attributes:
        layer: the layer's name in the model.
        part: which of the weights that it stacks; ``""`` is the whole layer.
        name: what it is called in Hugging Face's model, or the layer's own name where that has none.
        rows: its output features.
    """

    layer: str
    part: str
    name: str
    rows: int


def megatron_parts(model: nn.Module, *, fused: bool = False) -> dict[str, list[Part]]:
    """Return the parts of Megatron-core's linear layers in ``model`` by the layer's name; the output head has none.

    Args:
        fused: count a layer that stacks several weights as one.
    """
    found: dict[str, list[Part]] = {}
    for layer, module, stack in _stacked_layers(model):
        names = _hugging_face_names(layer, stack)
        if stack is None or fused:
            whole: Any = module
            found[layer] = [Part(layer, "", names.get("", layer), whole.output_size)]
        else:
            found[layer] = [
                Part(layer, part, names.get(part, f"{layer}.{part}"), stack.groups * rows)
                for part, rows in stack.rows.items()
            ]
    return found


def stacks(model: nn.Module) -> dict[str, Stack | None]:
    """Return how the rows of every linear layer of Megatron-core are stacked, by the layer's name."""
    return {layer: stack for layer, _, stack in _stacked_layers(model)}


def _stacked_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module, Stack | None]]:
    if not has_megatron():
        return
    modules = {clean_name(name): module for name, module in model.named_modules()}
    heads = {id(getattr(module, "output_layer", None)) for module in modules.values() if is_megatron(module)}
    for name, module in modules.items():
        if is_parallel_linear(module) and id(module) not in heads:
            parent, _, child = name.rpartition(".")
            owner = modules.get(parent)
            yield name, module, None if getattr(owner, "config", None) is None else stack_of(owner, child)


def _hugging_face_names(layer: str, stack: Stack | None) -> dict[str, str]:
    match = _BLOCK.fullmatch(layer)
    if match is None:
        return {}
    inside = match["inside"]
    if inside == "self_attention.linear_qkv" and stack is not None:
        parts = _ATTENTION
    elif inside == "self_attention.linear_proj":
        parts = {"": "self_attn.o_proj"}
    else:
        parts = _feed_forward(inside, stack)
    return {part: f"{match['before']}model.layers.{match['index']}.{name}" for part, name in parts.items()}


def _feed_forward(inside: str, stack: Stack | None) -> dict[str, str]:
    expert = re.fullmatch(r"mlp\.experts\.local_experts\.(\d+)\.(linear_fc[12])", inside)
    if expert is not None:
        before, child = f"mlp.experts.{expert[1]}", expert[2]
    else:
        before, _, child = inside.rpartition(".")
    if child == "linear_fc1" and stack is not None and before.startswith("mlp"):
        return {"gate": f"{before}.gate_proj", "up": f"{before}.up_proj"}
    return {"": f"{before}.down_proj"} if child == "linear_fc2" and before.startswith("mlp") else {}
