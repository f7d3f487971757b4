"""Map Megatron-core's layers, part by part, to their names in Hugging Face's models; patterns may use either."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from lightning_lora.layers.base import Part
from lightning_lora.megatron.core import is_gpt, is_parallel_linear
from lightning_lora.megatron.stack import Stack, stack_in
from lightning_lora.megatron.table import HF_TABLE, row_of
from lightning_lora.model.names import clean_name


def megatron_parts(model: nn.Module) -> dict[str, list[Part]]:
    """Return the parts of Megatron-core's linear layers in ``model`` by the layer's name; the output head has none."""
    modules = {clean_name(name): module for name, module in model.named_modules()}
    return {
        name: parts_in(modules, name)
        for name, module in modules.items()
        if is_parallel_linear(module) and not is_output_head(modules, name)
    }


def parts_in(modules: Mapping[str, nn.Module], layer: str, *, fused: bool = False) -> list[Part]:
    """Return the parts of one linear layer under Hugging Face's names, or the layer's own where it has none there.

    Args:
        modules: all modules of the model, by name.
        fused: count a layer that stacks several weights as one.
    """
    base: Any = modules[layer]
    stack = stack_in(modules, layer)
    names = _hugging_face_names(layer, stack)
    if stack is None or fused:
        return [Part(names.get("", layer), "", (base.input_size, base.output_size))]
    return [
        Part(names.get(part, f"{layer}.{part}"), part, (base.input_size, stack.groups * rows))
        for part, rows in stack.rows.items()
    ]


def is_output_head(modules: Mapping[str, nn.Module], layer: str) -> bool:
    """Whether the layer called ``layer`` makes a ``GPTModel``'s logits."""
    parent, _, child = layer.rpartition(".")
    return child == "output_layer" and parent in modules and is_gpt(modules[parent])


def hugging_face_name(parameter: str) -> str | None:
    """Return the name of a parameter in Hugging Face's model, if it is the same there; stacks have none."""
    found = row_of(parameter, HF_TABLE, ())
    if found is None or found[0].layout != "plain" or ".experts." in parameter:
        return None
    return found[1][0]


def _hugging_face_names(layer: str, stack: Stack | None) -> dict[str, str]:
    """Return the Hugging Face name of each weight that a layer stacks, by part; of a plain layer under ``""``."""
    found = row_of(f"{layer}.weight", HF_TABLE, ())
    if found is None:
        return {}
    before = layer[: layer.index("decoder.layers.")]
    names = [before + source.removesuffix(".weight") for source in found[1]]
    parts = [""] if stack is None else list(stack.rows)
    return dict(zip(parts, names, strict=True)) if len(parts) == len(names) else {}
