"""Cut a tensor-parallel rank's part of each layout out of a checkpoint's tensors."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.megatron.table import Row


@dataclass(frozen=True)
class Source:
    """One tensor of the checkpoint, or one slice of its first dimension, of which nothing has been read."""

    key: str
    index: int | None
    slices: Any

    @property
    def shape(self) -> list[int]:
        whole = list(self.slices.get_shape())
        return whole if self.index is None else whole[1:]

    def part(self, dim: int, start: int, stop: int) -> Tensor:
        """Return ``[start:stop]`` of a dimension."""
        place = (slice(None),) * dim + (slice(start, stop),)
        part: Tensor = self.slices[place if self.index is None else (self.index, *place)]
        return part


# what shapes the sources have, and this rank's part, given its place among how many
Plan = tuple[list[list[int]], Callable[[int, int], Tensor]]


def plan(row: Row, parameter: Tensor, sources: list[Source], owner: nn.Module, size: int) -> Plan:
    """Return what a parameter's sources have to be, and how this rank's part is read from them.

    Raises:
        ValueError: ``linear_qkv`` is not made up as its ``config`` says.
    """
    return _LAYOUTS[row.layout](row, parameter, sources, owner, size)


def _plain(row: Row, parameter: Tensor, sources: list[Source], owner: nn.Module, size: int) -> Plan:
    dim = row.dim or 0
    whole = list(parameter.shape)
    if row.dim is not None:
        whole[dim] *= size
    return [whole], partial(_chunk, sources[0], dim, shared=row.dim is not None)


def _gate_up(row: Row, parameter: Tensor, sources: list[Source], owner: nn.Module, size: int) -> Plan:
    rows, *rest = parameter.shape
    if len(sources) == 2:
        return [[rows // 2 * size, *rest]] * 2, lambda rank, n: torch.cat([_chunk(s, 0, rank, n) for s in sources])
    half = rows // 2

    def halves(rank: int, size: int) -> Tensor:
        starts = (rank * half, (size + rank) * half)
        return torch.cat([sources[0].part(0, start, start + half) for start in starts])

    return [[rows * size, *rest]], halves


def _qkv(row: Row, parameter: Tensor, sources: list[Source], owner: nn.Module, size: int) -> Plan:
    config: Any = owner.config
    rest = list(parameter.shape[1:])
    heads, groups = config.num_attention_heads, config.num_query_groups
    if groups % size or (heads + 2 * groups) * config.kv_channels != parameter.shape[0] * size:
        raise ValueError(
            f"linear_qkv of {parameter.shape[0]} rows on each of {size} ranks is not q, k and v of {heads} heads and "
            f"{groups} query groups of {config.kv_channels} channels, in whole groups to a rank"
        )

    def by_group(rank: int, size: int) -> Tensor:
        parts = [_chunk(source, 0, rank, size) for source in sources]
        return torch.cat([part.view(groups // size, -1, *rest) for part in parts], 1).flatten(0, 1)

    return [[number * config.kv_channels, *rest] for number in (heads, groups, groups)], by_group


_LAYOUTS: dict[str, Callable[[Row, Tensor, list[Source], nn.Module, int], Plan]] = {
    "plain": _plain,
    "gate_up": _gate_up,
    "qkv": _qkv,
}


def _chunk(source: Source, dim: int, rank: int, size: int, shared: bool = True) -> Tensor:
    """Return this rank's part of one dimension, or the whole of it."""
    length = source.shape[dim]
    return source.part(dim, *((rank * length // size, (rank + 1) * length // size) if shared else (0, length)))
