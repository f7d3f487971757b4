"""Which of a model's named adapters act: :class:`Choice`, and :class:`Mixture`, an adapter for each row of a batch."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_lora.ops.dropout import Seeds


class Part(NamedTuple):
    """The rows of one input on which one adapter acts, or the base alone: one run of them, or their indices."""

    name: str | None
    rows: slice | Tensor

    def take(self, tensor: Tensor, dim: int = 0) -> Tensor:
        """Return this part's rows of ``tensor``: a view of one run, else a copy."""
        if isinstance(self.rows, slice):
            return tensor.narrow(dim, self.rows.start, self.rows.stop - self.rows.start)
        return tensor.index_select(dim, self.rows)

    def indices(self, device: torch.device) -> Tensor:
        """Return the indices of the rows."""
        if isinstance(self.rows, slice):
            return torch.arange(self.rows.start, self.rows.stop, device=device)
        return self.rows


class Mixture:
    """The adapter of every row of a batch, ``None`` for the base alone.

    A row is an entry of the first dimension of the model's inputs; with ``lengths`` it is a segment of packed tokens.

    Args:
        names: one for each row.
        lengths: of the segments, in tokens.
        repeats: how many copies of each row the layers may get, side by side: the beams of ``generate``.
        exact: run the base's products for each adapter apart, too.
        known: the names of all adapters, which ``owners`` counts.
        device: of ``owners``.

    Attributes:
        owners: the place of the adapter of every row or packed token in ``known``, -1 for the base: what a graph of
            torch.compile reads.
        present: whether each adapter in ``known`` has rows; on CPU.
    """

    def __init__(
        self,
        names: Sequence[str | None],
        *,
        lengths: Sequence[int] | None = None,
        repeats: int = 1,
        exact: bool = False,
        known: Sequence[str] = (),
        device: torch.device | None = None,
    ) -> None:
        self.names, self.repeats, self.exact = tuple(names), repeats, exact
        self.is_packed = lengths is not None
        self.lengths = [1] * len(self.names) if lengths is None else list(lengths)
        self.num_units = sum(self.lengths)  # rows, or packed tokens
        places: dict[str | None, int] = {None: -1, **{name: place for place, name in enumerate(known)}}
        owners = [places[name] for name, length in zip(self.names, self.lengths, strict=True) for _ in range(length)]
        self.owners = torch.tensor(owners, dtype=torch.int64, device=device)
        self.present = torch.tensor([places[name] in owners for name in known], dtype=torch.bool, device="cpu")
        self._parts: dict[Any, list[Part]] = {}  # by units' size and device

    def parts(self, shape: torch.Size, device: torch.device) -> list[Part]:
        """Return the parts of an input that is flattened to rows: ``shape`` is that of its leading dimensions.

        Raises:
            ValueError: its rows are not those of this mixture.
        """
        size = self._unit_size(shape)
        key = size, device
        if key not in self._parts:
            self._parts[key] = list(self._cut(size, device))
        return self._parts[key]

    def _unit_size(self, shape: torch.Size) -> int:
        """Return how many of the flattened rows belong to one unit."""
        if not self.fits(shape):
            raise ValueError(self._misfit(shape))
        return shape.numel() // self.num_units

    def fits(self, shape: torch.Size) -> bool:
        """Return True if an input with these leading dimensions has the rows of this mixture."""
        if self.is_packed:
            return shape.numel() == self.num_units
        if len(shape) == 1:  # rows may be flattened with their tokens
            return shape[0] % self.num_units == 0
        return shape[0] in (self.num_units, self.num_units * self.repeats)

    def _misfit(self, shape: torch.Size) -> str:
        given = f"an adapted layer got an input with the leading dimensions {list(shape)}, and active(...) was given "
        if self.is_packed:
            return f"{given}segments of {self.num_units} tokens in all: their lengths have to sum to all tokens"
        return (
            f"{given}{self.num_units} names: one is expected for each row of the first dimension. Packed rows take "
            "lengths=, the beams of generate take repeats=num_beams"
        )

    def _cut(self, size: int, device: torch.device) -> Iterator[Part]:
        runs: dict[str | None, list[tuple[int, int]]] = {}
        stop = 0
        for name, length in zip(self.names, self.lengths, strict=True):
            start, stop = stop, stop + length * size
            if start == stop:
                continue  # an adapter without rows gets no gradient
            own = runs.setdefault(name, [])
            if own and own[-1][1] == start:
                start = own.pop()[0]
            own.append((start, stop))
        for name, own in runs.items():
            if len(own) == 1:
                yield Part(name, slice(*own[0]))
            else:
                yield Part(name, torch.cat([torch.arange(*run, device=device) for run in own]))


class Undecided:
    """Stands for the choice that nobody has made."""

    def __reduce__(self) -> str:
        return "UNDECIDED"  # a copy is this very object


UNDECIDED = Undecided()
Acting = str | Mixture | None


class Choice:
    """What acts in the layers of one model, which share this object.

    Attributes:
        seeds: of the dropout of every adapter, by name.
        chosen: what was chosen, if anything.
        is_apart: whether one layer is run for each adapter of a mixture apart.
    """

    def __init__(self) -> None:
        self.seeds: dict[str, Seeds] = {}
        self.chosen: Acting | Undecided = UNDECIDED
        self.is_apart = False

    @property
    def names(self) -> list[str]:
        """The names of all adapters, in the order in which they were added."""
        return list(self.seeds)

    @property
    def acting(self) -> Acting:
        """The name of the adapter that acts on all rows, a mixture, or ``None`` for the base alone.

        Raises:
            ValueError: there are several adapters, and none was chosen.
        """
        if not isinstance(self.chosen, Undecided):
            return self.chosen
        if len(self.names) == 1:
            return self.names[0]
        raise ValueError(
            f"the model has {len(self.names)} adapters, {', '.join(self.names)}, and none was chosen: run it inside "
            "`with active(model, name):`, or `with active(model, names):` with a name for each row of the batch, or "
            "let LoRACallback(adapter_key=...) take the names from the batch"
        )

    @contextmanager
    def only(self, acting: Acting) -> Iterator[None]:
        """Let one adapter of a mixture act inside the block."""
        former, self.chosen, self.is_apart = (self.chosen, self.is_apart), acting, True
        try:
            yield
        finally:
            self.chosen, self.is_apart = former
