"""What Megatron-core's layers are called in Hugging Face's models, part by part: both names are understood."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_lora.megatron.layers import Stack, has_megatron, is_parallel_linear, stack_of
from lightning_lora.megatron.table import HF_TABLE, row_of
from lightning_lora.model.names import clean_name
from lightning_lora.model.root import is_megatron


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


def by_layer(parts: Mapping[str, Part], layers: Mapping[str, nn.Module]) -> dict[str, list[Part]]:
    """Return the parts that are to be adapted, by the layer that stacks them."""
    found: dict[str, list[Part]] = {}
    for name in layers:
        if name in parts:
            found.setdefault(parts[name].layer, []).append(parts[name])
    return found


def hugging_face_name(parameter: str) -> str | None:
    """Return the name of a parameter in Hugging Face's model, if it is the same there; stacks have none."""
    found = row_of(parameter, HF_TABLE, ())
    if found is None or found[0].layout != "plain" or ".experts." in parameter:
        return None
    return found[1][0]


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
    """Return the Hugging Face name of each weight that a layer stacks, by part; of a plain layer under ``""``."""
    found = row_of(f"{layer}.weight", HF_TABLE, ())
    if found is None:
        return {}
    before = layer[: layer.index("decoder.layers.")]
    names = [before + source.removesuffix(".weight") for source in found[1]]
    parts = [""] if stack is None else list(stack.rows)
    return dict(zip(parts, names, strict=True)) if len(parts) == len(names) else {}
