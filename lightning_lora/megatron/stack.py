"""How one weight of Megatron-core stacks several: q, k, v in ``linear_qkv``, gate and up in ``linear_fc1``."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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


def stack_of(parent: Any, child_name: str) -> Stack | None:
    """Return how the weight of a Megatron-core layer is stacked, or ``None`` for one that is not.

    Raises:
        ValueError: it is stacked in a way that is not served.
    """
    config = parent.config
    if child_name == "linear_qkv":
        if getattr(config, "attention_output_gate", False):
            raise ValueError("attention_output_gate=True puts a gate beside the queries, which is not served")
        head, groups = config.kv_channels, config.num_query_groups
        layer = parent.linear_qkv
        size = layer.output_size // layer.output_size_per_partition
        if groups % size:
            raise ValueError(
                f"num_query_groups={groups} is not divisible by tensor_parallel_size={size}, so that ranks would share "
                "keys and values, which is not served: take fewer tensor-parallel ranks"
            )
        return Stack(groups, {"q": config.num_attention_heads // groups * head, "k": head, "v": head})
    if child_name == "linear_fc1" and config.gated_linear_unit:
        rows = parent.linear_fc1.output_size // 2
        return Stack(1, {"gate": rows, "up": rows})
    return None


def stack_in(modules: Mapping[str, nn.Module], layer: str) -> Stack | None:
    """Return :func:`stack_of` the layer called ``layer``, given all modules of its model by name."""
    parent, _, child = layer.rpartition(".")
    owner = modules.get(parent)
    return None if getattr(owner, "config", None) is None else stack_of(owner, child)
