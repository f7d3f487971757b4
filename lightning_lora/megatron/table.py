"""Which tensors of a Hugging Face checkpoint each parameter of a Megatron-core ``GPTModel`` is made of.

    q, k, v      ->  linear_qkv   rows by query group: [q_0 .. q_(n-1), k, v] of group 0, of group 1, ...
    gate, up     ->  linear_fc1   [gate; up]; a tensor-parallel rank has [its gate; its up]

A rank's part of ``linear_qkv`` is its query groups, and so a run of rows of each of q, k and v.
"""

import re
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Row:
    """One kind of parameter and its sources.

    Args:
        megatron: the parameter's name in a ``GPTModel``; each ``*`` is a number.
        hf: names in the checkpoint, whose ``*`` are those numbers in order. ``"experts.down_proj[*]"`` is one slice of
            the first dimension.
        layout: ``"plain"`` is one tensor as it is; ``"qkv"`` are q, k and v, and ``"gate_up"`` the two halves, or one
            tensor with both.
        dim: which dimension tensor-parallel ranks share; ``None`` where each has the whole.

    Raises:
        ValueError, TypeError: names or layout do not fit one another.

    Example::

        Row("decoder.layers.*.mlp.linear_fc2.weight", ("model.layers.*.ffn.w2.weight",), dim=1)
    """

    megatron: str
    hf: tuple[str, ...]
    layout: Literal["plain", "qkv", "gate_up"] = "plain"
    dim: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.hf, str) or not all(isinstance(name, str) for name in self.hf):
            raise TypeError(f"hf={self.hf!r} must be a tuple of names: ({self.hf!r},)")
        counts = {"plain": (1,), "qkv": (3,), "gate_up": (1, 2)}
        if self.layout not in counts:
            raise ValueError(f"layout={self.layout!r} must be one of {', '.join(map(repr, counts))}")
        if len(self.hf) not in counts[self.layout]:
            expected = " or ".join(map(str, counts[self.layout]))
            raise ValueError(f"layout={self.layout!r} is made of {expected} tensors; hf has {len(self.hf)}: {self.hf}")
        for name in self.hf:
            if name.count("*") != self.megatron.count("*"):
                raise ValueError(
                    f"{name!r} has {name.count('*')} '*', and {self.megatron!r} {self.megatron.count('*')}"
                )

    def sources(self, name: str) -> list[str] | None:
        """Return the names in the checkpoint that make up a parameter, or ``None`` where the row is of others.

        ``name`` may stand behind the path of the ``GPTModel`` in a larger model.
        """
        match = pattern(self.megatron, r"(?:.*\.)?").fullmatch(name)
        return None if match is None else [_numbered(key, match.groups()) for key in self.hf]


def row_of(name: str, table: Sequence[Row], keys: Container[str]) -> tuple[Row, list[str]] | None:
    """Return the last row of ``table`` that is of this parameter, and its sources; rather one whose are in ``keys``."""
    rows = [(row, found) for row in reversed(table) if (found := row.sources(name)) is not None]
    whole = (one for one in rows if all(split_index(source)[0] in keys for source in one[1]))
    return next(whole, rows[0] if rows else None)


def split_index(source: str) -> tuple[str, int | None]:
    """Return the key and the index of ``"key[index]"``; a key alone has none."""
    match = re.fullmatch(r"(.*)\[(\d+)\]", source)
    return (source, None) if match is None else (match[1], int(match[2]))


@cache
def pattern(name: str, before: str = "") -> re.Pattern[str]:
    """Return the regular expression of a name in which each ``*`` is a number."""
    return re.compile(before + re.escape(name).replace(r"\*", r"(\d+)"))


def _numbered(name: str, numbers: Sequence[str]) -> str:
    remaining = iter(numbers)
    return re.sub(r"\*", lambda _: next(remaining), name)


_LAYER, _HF = "decoder.layers.*.", "model.layers.*."
_ATTENTION, _HF_ATTENTION = f"{_LAYER}self_attention.", f"{_HF}self_attn."
_QKV = ("q_proj", "k_proj", "v_proj")
_EXPERT, _HF_EXPERT = f"{_LAYER}mlp.experts.local_experts.*.", f"{_HF}mlp.experts.*."
_GROUPED, _HF_FUSED = f"{_LAYER}mlp.experts.", f"{_HF}mlp.experts."
_HALVES = ("gate_proj.weight", "up_proj.weight")

HF_TABLE: tuple[Row, ...] = (
    Row("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), dim=0),
    Row("decoder.final_layernorm.weight", ("model.norm.weight",)),
    Row("output_layer.weight", ("lm_head.weight",), dim=0),
    # norms have a module of their own in local layers; Transformer Engine's are part of the linear layer that follows
    Row(f"{_LAYER}input_layernorm.weight", (f"{_HF}input_layernorm.weight",)),
    Row(f"{_ATTENTION}linear_qkv.layer_norm_weight", (f"{_HF}input_layernorm.weight",)),
    Row(f"{_LAYER}pre_mlp_layernorm.weight", (f"{_HF}post_attention_layernorm.weight",)),
    Row(f"{_LAYER}mlp.linear_fc1.layer_norm_weight", (f"{_HF}post_attention_layernorm.weight",)),
    Row(f"{_ATTENTION}linear_qkv.weight", tuple(f"{_HF_ATTENTION}{part}.weight" for part in _QKV), "qkv", 0),
    Row(f"{_ATTENTION}linear_qkv.bias", tuple(f"{_HF_ATTENTION}{part}.bias" for part in _QKV), "qkv", 0),
    Row(f"{_ATTENTION}q_layernorm.weight", (f"{_HF_ATTENTION}q_norm.weight",)),
    Row(f"{_ATTENTION}k_layernorm.weight", (f"{_HF_ATTENTION}k_norm.weight",)),
    Row(f"{_ATTENTION}linear_proj.weight", (f"{_HF_ATTENTION}o_proj.weight",), dim=1),
    Row(f"{_LAYER}mlp.linear_fc1.weight", tuple(f"{_HF}mlp.{half}" for half in _HALVES), "gate_up", 0),
    Row(f"{_LAYER}mlp.linear_fc2.weight", (f"{_HF}mlp.down_proj.weight",), dim=1),
    Row(f"{_LAYER}mlp.router.weight", (f"{_HF}mlp.gate.weight",)),
    # experts as modules, or as Transformer Engine's grouped layer; on disk one by one, or fused in three dimensions
    Row(f"{_EXPERT}linear_fc1.weight", (f"{_HF_FUSED}gate_up_proj[*]",), "gate_up", 0),
    Row(f"{_EXPERT}linear_fc2.weight", (f"{_HF_FUSED}down_proj[*]",), dim=1),
    Row(f"{_EXPERT}linear_fc1.weight", tuple(_HF_EXPERT + half for half in _HALVES), "gate_up", 0),
    Row(f"{_EXPERT}linear_fc2.weight", (f"{_HF_EXPERT}down_proj.weight",), dim=1),
    Row(f"{_GROUPED}linear_fc1.weight*", (f"{_HF_FUSED}gate_up_proj[*]",), "gate_up", 0),
    Row(f"{_GROUPED}linear_fc2.weight*", (f"{_HF_FUSED}down_proj[*]",), dim=1),
    Row(f"{_GROUPED}linear_fc1.weight*", tuple(_HF_EXPERT + half for half in _HALVES), "gate_up", 0),
    Row(f"{_GROUPED}linear_fc2.weight*", (f"{_HF_EXPERT}down_proj.weight",), dim=1),
)


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


# which shapes the sources must have, and what reads a rank's part from them, given its place
Reading = tuple[list[list[int]], Callable[[int], Tensor]]


def _plain(row: Row, parameter: Tensor, sources: list[Source], owner: nn.Module, size: int) -> Reading:
    [source], shape = sources, list(parameter.shape)
    if row.dim is None:
        return [shape], lambda rank: source.part(0, 0, source.shape[0])
    dim = row.dim
    shape[dim] *= size
    return [shape], lambda rank: _chunk(source, dim, rank, size)


def _gate_up(row: Row, parameter: Tensor, sources: list[Source], owner: nn.Module, size: int) -> Reading:
    rows, *rest = parameter.shape
    half = rows // 2
    if len(sources) == 2:
        return [[half * size, *rest]] * 2, lambda rank: torch.cat([_chunk(source, 0, rank, size) for source in sources])

    def halves(rank: int) -> Tensor:
        starts = (rank * half, (size + rank) * half)
        return torch.cat([sources[0].part(0, start, start + half) for start in starts])

    return [[rows * size, *rest]], halves


def _qkv(row: Row, parameter: Tensor, sources: list[Source], owner: nn.Module, size: int) -> Reading:
    """Raise ``ValueError`` for a ``linear_qkv`` that is not made up as its ``config`` says."""
    config: Any = owner.config
    rest = list(parameter.shape[1:])
    heads, groups = config.num_attention_heads, config.num_query_groups
    if groups % size or (heads + 2 * groups) * config.kv_channels != parameter.shape[0] * size:
        raise ValueError(
            f"linear_qkv of {parameter.shape[0]} rows on each of {size} ranks is not q, k and v of {heads} heads and "
            f"{groups} query groups of {config.kv_channels} channels, in whole groups to a rank"
        )

    def by_group(rank: int) -> Tensor:
        parts = [_chunk(source, 0, rank, size) for source in sources]
        return torch.cat([part.view(groups // size, -1, *rest) for part in parts], 1).flatten(0, 1)

    return [[number * config.kv_channels, *rest] for number in (heads, groups, groups)], by_group


def _chunk(source: Source, dim: int, rank: int, size: int) -> Tensor:
    length = source.shape[dim]
    return source.part(dim, rank * length // size, (rank + 1) * length // size)


# by layout, given the parameter's module and the number of ranks
READINGS: dict[str, Callable[[Row, Tensor, list[Source], nn.Module, int], Reading]] = {
    "plain": _plain,
    "gate_up": _gate_up,
    "qkv": _qkv,
}
