"""The weights that Megatron-core's linear layers stack, and their names in Hugging Face's models.

``linear_qkv`` stacks q, k and v, and ``linear_fc1`` gate and up. Patterns may use either name.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lora.layers.base import Part
from lightning_lora.megatron.core import is_gpt, is_parallel_linear
from lightning_lora.megatron.table import HF_TABLE, row_of
from lightning_lora.model.names import clean_name


@dataclass(frozen=True)
class Stack:
    """How the rows of one weight are made of several: ``groups`` times each part's own rows, one part after the other.

    Attributes:
        groups: query groups of ``linear_qkv``, whose rows are ``[q, k, v]`` for each; 1 for ``[gate, up]``.
        rows: rows of each part in one group, by its name.
    """

    groups: int
    rows: Mapping[str, int]

    @property
    def stripes(self) -> int:
        """How many pieces of rows each rank has a share of: groups are shared out whole, gate and up each."""
        return len(self.rows) if self.groups == 1 else 1

    def place(self, part: str) -> tuple[int, int, int]:
        """Return a part's first row inside a group, its rows in one, and all rows of one."""
        before = list(self.rows)[: list(self.rows).index(part)]
        return sum(self.rows[name] for name in before), self.rows[part], sum(self.rows.values())

    def assembled(self, factors: Mapping[str, Tensor], ranks: Mapping[str, int], num_local_rows: int) -> Tensor:
        """Return B of the whole layer, ``[rows of this rank, sum of ranks]``: zero but for each part's own block.

        Args:
            factors: B by part, ``[rows of the part on this rank, r]``.
            ranks: r by part.
            num_local_rows: rows of the layer on this rank.
        """
        some = next(iter(factors.values()))
        whole_rows = self.groups * sum(self.rows.values())
        total, column = sum(ranks.values()), 0
        groups = self.groups * num_local_rows // whole_rows if self.groups > 1 else 1
        blocks = []
        for part, rows in self.rows.items():
            own = rows if self.groups > 1 else rows * num_local_rows // whole_rows
            if part in factors:
                block = factors[part].view(groups, own, ranks[part])
                blocks.append(F.pad(block, (column, total - column - ranks[part])))
                column += ranks[part]
            else:
                blocks.append(some.new_zeros(groups, own, total))
        return torch.cat(blocks, 1).view(num_local_rows, total)


def stack_in(modules: Mapping[str, nn.Module], layer: str) -> Stack | None:
    """Return how the weight of the layer called ``layer`` is stacked, or ``None`` for one that is not.

    Args:
        modules: all modules of the model, by name.

    Raises:
        ValueError: it is stacked in a way that is not served.
    """
    parent, _, child = layer.rpartition(".")
    config: Any = getattr(modules.get(parent), "config", None)
    linear: Any = modules[layer]
    if config is not None and child == "linear_qkv":
        if getattr(config, "attention_output_gate", False):
            raise ValueError("attention_output_gate=True puts a gate beside the queries, which is not served")
        head, groups = config.kv_channels, config.num_query_groups
        size = linear.output_size // linear.output_size_per_partition
        if groups % size:
            raise ValueError(
                f"num_query_groups={groups} is not divisible by tensor_parallel_size={size}, so that ranks would share "
                "keys and values, which is not served: take fewer tensor-parallel ranks"
            )
        return Stack(groups, {"q": config.num_attention_heads // groups * head, "k": head, "v": head})
    if config is not None and child == "linear_fc1" and config.gated_linear_unit:
        rows = linear.output_size // 2
        return Stack(1, {"gate": rows, "up": rows})
    return None


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
