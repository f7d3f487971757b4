"""Recompute dropout masks in backward instead of storing them: a mask is a hash of a seed and of positions."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor

from lightning_lora.compat.torch import has_transforms

# odd multipliers of 32-bit integer mixers (Wellons' "lowbias32" search) that fit a signed 32-bit integer
_MIX_1 = 0x21F0AAAD
_MIX_2 = 0x735A2D97
_GOLDEN = 0x1E3779B97F4A7C15


class Seeds:
    """The seeds of one named adapter's dropout: numbers that count up, of which every call takes the next."""

    alive: ClassVar["WeakSet[Seeds]"] = WeakSet()

    def __init__(self, first: int) -> None:
        self.next = torch.tensor(first, dtype=torch.int64, device="cpu")
        self.alive.add(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.alive.add(self)

    def draw(self) -> Tensor:
        """Return the next seed, and go on to the one after it."""
        seed = self.next.clone()
        self.next.add_(1)
        return seed

    def take_back(self, next_seed: Tensor, is_drawn: Tensor) -> None:
        """Go back to ``next_seed`` unless ``is_drawn``, a boolean in a tensor: in a graph that draws at any rate."""
        self.next.copy_(torch.where(is_drawn, self.next, next_seed))

    @classmethod
    def positions(cls) -> dict["Seeds", int]:
        """Return the next seed of every adapter in this process."""
        return {seeds: int(seeds.next) for seeds in cls.alive}

    @classmethod
    @contextmanager
    def at(cls, positions: Mapping["Seeds", int]) -> Iterator[None]:
        """Draw the seeds from ``positions`` inside the block, and go on after it as if none had been drawn."""
        present = {seeds: int(seeds.next) for seeds in positions}
        for seeds, position in positions.items():
            seeds.next.fill_(position)
        try:
            yield
        finally:
            for seeds, position in present.items():
                seeds.next.fill_(position)


class SharedSeeds:
    """The seeds of some layers of one adapter that read one input, whose calls in turn have one mask.

    Args:
        seeds: of the adapter.
        size: how many layers there are.
    """

    def __init__(self, seeds: Seeds, size: int) -> None:
        self.seeds, self.size = seeds, size
        self.latest: Tensor | None = None
        self.waiting: list[int] = []  # the places of the layers that have not had the latest seed

    def draw(self, place: int) -> Tensor:
        """Return the latest seed to a layer that has not had it, else a new one."""
        if self.latest is None or place not in self.waiting:
            self.latest, self.waiting = self.seeds.draw(), list(range(self.size))
        seed = self.latest
        self.pass_over(place)
        return seed.clone()

    def pass_over(self, place: int) -> None:
        """Note that a layer has the latest seed: its output was computed together with that of another."""
        self.waiting = [one for one in self.waiting if one != place]
        if not self.waiting:
            self.latest = None


class LayerSeeds(NamedTuple):
    """The seeds of the layer at one place among those that share theirs."""

    shared: SharedSeeds
    place: int

    def draw(self) -> Tensor:
        """Return the seed of this layer's next call."""
        return self.shared.draw(self.place)

    def pass_over(self) -> None:
        """Note that this layer's output was computed together with that of another, by its seed."""
        self.shared.pass_over(self.place)


def keep_mask(
    seed: Tensor,
    like: Tensor,
    dropout: float,
    columns: tuple[int, int] | None = None,
    first_row: int = 0,
    *,
    num_columns: int | None = None,
) -> Tensor:
    """Return zeros where an entry is dropped and ones elsewhere, in the dtype of ``like``, for its rows and device.

    A hash of (seed, row, column) in integer tensor operations: the same on every call and every device, with nothing
    stored and no random state touched. CPU multiplies by numbers an order of magnitude faster than it makes and applies
    booleans.

    Args:
        seed: scalar integer tensor; on another device than ``like`` it may only be a CPU one.
        like: ``[num_rows, num_columns]``; ``num_columns`` may be given apart.
        columns: where ``like`` is a slice of features, the position of its first one and the number of all.
        first_row: where ``like`` is a slice of rows, the position of its first one.
    """
    num_rows, size = like.shape[0], like.shape[1] if num_columns is None else num_columns
    first, total = columns or (0, size)
    keys = _position_keys(seed, total + first_row + num_rows, like.device)
    across, _, rows = keys.split([total, first_row, num_rows])
    z: Tensor = rows[:, None] ^ across[None, first : first + size]  # int32, [num_rows, size]
    z = z.mul_(_MIX_1)
    z = z.bitwise_xor_(z >> 15)
    threshold = round(dropout * 2**32) - 2**31  # a share `dropout` of all signed 32-bit numbers lies below
    return z.mul_(_MIX_2).ge_(threshold).to(like.dtype)


def keep_entries(x: Tensor, seed: Tensor, dropout: float) -> Tensor:
    """Return ``x`` with a share ``dropout`` of its entries set to zero and the others scaled up, by a hash of ``seed``.

    Args:
        x: ``[rows, ...]``, any number of dimensions.
    """
    rows = x.reshape(x.shape[0], -1) if x.ndim > 1 else x[None]
    kept = keep_mask(seed, rows, dropout)
    return (rows * kept / (1 - dropout)).view(x.shape)


def _position_keys(seed: Tensor, num_positions: int, device: torch.device) -> Tensor:
    """Return one well mixed 32-bit key per position: int32, ``[num_positions]``."""
    if not torch.compiler.is_compiling() and has_transforms():
        seed = seed.to(device)  # vmap may give one per sample, and only a scalar may be on another device
    z = torch.arange(1, num_positions + 1, dtype=torch.int64, device=device)
    z = (z + seed * 0x2545F4914F6CDD1D) * _GOLDEN
    z = (z ^ (z >> 32)) * 0x3F58476D1CE4E5B9
    z = (z ^ (z >> 29)) * 0x14D049BB133111EB
    return (z >> 31).to(torch.int32)
