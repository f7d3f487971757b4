"""What a merge did to the update of every layer: :class:`MergeReceipt`."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

from typing_extensions import override

from lightning_lora.model.names import listed

_MOVED = "|base - W| / |update|"


@dataclass(frozen=True)
class LayerReceipt:
    """Norms of one layer's merge, taken over all elements (Frobenius norms).

    Attributes:
        name: of the layer.
        form: what the merged weight is stored as: ``"bfloat16"``, ``"nf4"`` and so on.
        weight_norm: of W, the base that the adapter was trained over.
        update_norm: of what the adapter adds to W.
        base_norm: of the difference between the base that was merged into and W; ``None`` if W is what was merged into,
            or is not known.
        rounding_norm: of the difference between the merged weight as it is stored and the exact sum.
        kept_product: of the update and of what merging changed in the weight as it is stored.
    """

    name: str
    form: str
    weight_norm: float
    update_norm: float
    base_norm: float | None
    rounding_norm: float
    kept_product: float

    @property
    def update(self) -> float:
        """``|update| / |W|``."""
        return _ratio(self.update_norm, self.weight_norm)

    @property
    def base_change(self) -> float | None:
        """``|base - W| / |update|``: how far the base moved under the adapter, in units of what it learned."""
        return None if self.base_norm is None else _ratio(self.base_norm, self.update_norm)

    @property
    def rounding(self) -> float:
        """``|stored - exact| / |update|``, with the exact sum of base and update."""
        return _ratio(self.rounding_norm, self.update_norm)

    @property
    def kept(self) -> float:
        """The fraction of the update that survives its rounding, along the update: ``<change, update> / |update|^2``.

        The change is between the weight as it is stored with and without the update. It is 1 without rounding, and 0
        where every element of the update is below half a step of the stored form.
        """
        return self.kept_product / self.update_norm**2 if self.update_norm else 1.0


@dataclass(frozen=True)
class MergeReceipt(Sequence[LayerReceipt]):
    """What a merge did: a sequence of :class:`LayerReceipt`, which prints as a table.

    Attributes:
        base: what was merged into: ``"trained"``, or where the original weights are.
        layers: one receipt for each adapted layer.
        trained_over: in which form the base was that the adapter was trained over, and in which it was loaded, in
            words, where these differ.
    """

    base: str
    layers: tuple[LayerReceipt, ...]
    trained_over: str | None = None

    @overload
    def __getitem__(self, index: int) -> LayerReceipt: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[LayerReceipt, ...]: ...
    @override
    def __getitem__(self, index: int | slice) -> LayerReceipt | tuple[LayerReceipt, ...]:
        return self.layers[index]

    @override
    def __len__(self) -> int:
        return len(self.layers)

    @property
    def total(self) -> LayerReceipt:
        """The norms over all layers."""
        bases = [one.base_norm for one in self.layers if one.base_norm is not None]
        return LayerReceipt(
            "all",
            ", ".join(dict.fromkeys(one.form for one in self.layers)),
            _norm([one.weight_norm for one in self.layers]),
            _norm([one.update_norm for one in self.layers]),
            _norm(bases) if bases else None,
            _norm([one.rounding_norm for one in self.layers]),
            sum(one.kept_product for one in self.layers),
        )

    def summary(self) -> str:
        """Return one line for all layers, and one that names the layers of which less than half is kept, if any."""
        total, into = self.total, self.base
        if self.base == "trained":
            into = "the trained base" if self.trained_over is None else "the base as it was loaded, not the trained one"
        into += "" if self.trained_over is None else f" ({self.trained_over})"
        moved = "" if total.base_change is None else f"; {_MOVED} = {total.base_change:.2g}"
        line = (
            f"merged {len(self)} layers into {into}, stored as {total.form}: |update| / |W| = {total.update:.2g}{moved}"
            f"; rounding / |update| = {total.rounding:.2g}, {100 * total.kept:.1f} % of the update is kept"
        )
        lost = [f"{one.name} ({100 * one.kept:.0f} %)" for one in self.layers if one.kept < 0.5]
        return line + (f"\n  less than half is kept of {listed(lost)}" if lost else "")

    @override
    def __str__(self) -> str:
        """Return :meth:`summary` and a table with a line for each layer."""
        rows = [("layer", "stored as", "|update| / |W|", _MOVED, "rounding / |update|", "kept")]
        rows += [
            (
                one.name,
                one.form,
                f"{one.update:.2g}",
                "-" if one.base_change is None else f"{one.base_change:.2g}",
                f"{one.rounding:.2g}",
                f"{100 * one.kept:.1f} %",
            )
            for one in (*self.layers, *([self.total] if self.layers else ()))
        ]
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        table = [
            "  " + "  ".join([*map(str.ljust, row[:2], widths), *map(str.rjust, row[2:], widths[2:])]) for row in rows
        ]
        return "\n".join([self.summary(), *table])


def _ratio(value: float, by: float) -> float:
    return value / by if by else (math.inf if value else 0.0)


def _norm(norms: Sequence[float]) -> float:
    return math.sqrt(sum(norm**2 for norm in norms))
