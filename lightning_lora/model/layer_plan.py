"""What was decided for a model: frozen records that can be printed, read and applied."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import overload

from torch import nn
from typing_extensions import override

from lightning_lora.config import LoRAConfig
from lightning_lora.layers.base import LoRALayer
from lightning_lora.model.base_form import QuantizationPlan
from lightning_lora.model.names import listed


@dataclass(frozen=True)
class LayerPlan:
    """One low-rank pair that an injection will add: ``B A``, scaled, beside a weight ``[out_features, in_features]``.

    Attributes:
        name: of the layer; of a layer or module with several pairs, of the weight that this one adapts.
        layer: name of the layer in the model, the same as ``name`` for most.
        part: which of the layer's weights or parameters; ``""`` is the whole layer.
        kind: name of the layer's class; ``"matrix"`` for a parameter.
        mixin: the class that will adapt it.
        r: rank.
        scaling: factor of ``B A``.
        dropout: probability of dropping an entry of the adapter's input.
        num_parameters: of the pair, and of what else the adapter trains here.
    """

    name: str
    layer: str
    part: str
    kind: str
    mixin: type[LoRALayer]
    in_features: int
    out_features: int
    r: int
    scaling: float
    dropout: float
    num_parameters: int = 0


@dataclass(frozen=True)
class RowsPlan:
    """Rows of an embedding or output head that will train.

    Attributes:
        name: of the table.
        tied: names of the layers that hold the same weight.
        token_ids: indices of the rows.
        num_parameters: of the rows.
    """

    name: str
    tied: tuple[str, ...]
    token_ids: tuple[int, ...]
    num_parameters: int


@dataclass(frozen=True)
class Plan(Sequence[LayerPlan]):
    """All that an injection will do to a model: a sequence of :class:`LayerPlan`, in the order of the model's modules.

    Attributes:
        config: the settings that were asked for.
        layers: the pairs.
        token_rows: single rows that train.
        trained_whole: names of the modules, and of parameters that a model holds itself, that train whole.
        trained: names and sizes of the base parameters that train: those of ``trained_whole``, and biases.
        capped: ranks of the layers that are smaller than the rank that was asked for, by name.
        quantization: what of the base is quantised first, if it was asked for.
        model_name: name of the model's class.
        num_base: number of the model's own parameters.
        model: the model, until the plan is applied.
    """

    config: LoRAConfig = field(hash=False)
    layers: tuple[LayerPlan, ...] = ()
    token_rows: tuple[RowsPlan, ...] = ()
    trained_whole: tuple[str, ...] = ()
    trained: Mapping[str, int] = field(default_factory=dict, hash=False)
    capped: Mapping[str, int] = field(default_factory=dict, hash=False)
    quantization: QuantizationPlan | None = None
    model_name: str = ""
    num_base: int = 0
    model: nn.Module | None = field(default=None, repr=False, compare=False)

    @overload
    def __getitem__(self, index: int) -> LayerPlan: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[LayerPlan, ...]: ...
    @override
    def __getitem__(self, index: int | slice) -> LayerPlan | tuple[LayerPlan, ...]:
        return self.layers[index]

    @override
    def __len__(self) -> int:
        return len(self.layers)

    def without_model(self) -> "Plan":
        """Return the plan as the record of what was done: it does not hold the model."""
        return replace(self, model=None)

    @property
    def num_adapter(self) -> int:
        """Number of parameters that the adapters add, rows that train included."""
        return sum(one.num_parameters for one in self.layers) + sum(rows.num_parameters for rows in self.token_rows)

    @property
    def num_trainable(self) -> int:
        """Number of parameters that will train."""
        return self.num_adapter + sum(self.trained.values())

    @property
    def capped_ranks(self) -> str:
        """A line that names the layers whose rank is their size, below the one asked for; empty without any."""
        names = [f"{name} (r={r})" for name, r in self.capped.items()]
        if not names:
            return ""
        return f"r={self.config.r} exceeds the size of these layers, whose rank is their size: {listed(names, 5)}"

    @override
    def __str__(self) -> str:
        """Return a table with a line for each pair, and what else trains below it."""
        rows = [("name", "kind", "size", "r", "scaling", "dropout", "parameters")]
        rows += [
            (
                one.name,
                one.kind,
                f"{one.in_features} -> {one.out_features}",
                str(one.r),
                f"{one.scaling:g}",
                f"{one.dropout:g}",
                f"{one.num_parameters:,}",
            )
            for one in self.layers
        ]
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = [
            f"LoRA for {self.model_name}: {len(self)} pair{'s' * (len(self) != 1)}, "
            f"{self.num_trainable:,} parameters train, {self.num_base - sum(self.trained.values()):,} are frozen"
        ]
        lines += [
            "  " + "  ".join([*map(str.ljust, row[:3], widths), *map(str.rjust, row[3:], widths[3:])]) for row in rows
        ]
        lines += [
            f"  rows of {rows.name} that train: {listed([*map(str, rows.token_ids)])}" for rows in self.token_rows
        ]
        if self.trained:
            lines.append(f"  trained whole: {listed(list(self.trained))} ({sum(self.trained.values()):,} parameters)")
        if self.quantization is not None:
            lines.append(f"  base in {self.quantization}")
        return "\n".join([*lines, *([f"  {self.capped_ranks}"] if self.capped else [])])
