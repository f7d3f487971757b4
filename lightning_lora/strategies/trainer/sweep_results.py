"""What the adapters of a sweep came to: the best one, a table, and a plot."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal


class SweepResults:
    """The values of one metric, by adapter.

    Attributes:
        history: steps and values, by adapter.
        remaining: the adapters that are not dropped.
    """

    def __init__(self, names: Sequence[str], monitor: str, mode: Literal["min", "max"]) -> None:
        if mode not in ("min", "max"):
            raise ValueError(f"mode={mode!r} must be 'min' or 'max'")
        self.monitor, self.mode = monitor, mode
        self.remaining = list(names)
        self.history: dict[str, list[tuple[int, float]]] = {name: [] for name in names}

    @property
    def best(self) -> str | None:
        """The adapter with the best last value among those that are not dropped."""
        return next((name for name in self.ranked(self.remaining) if self.history[name]), None)

    def ranked(self, names: Sequence[str]) -> list[str]:
        """Return adapters by their last value, the best one first, and those without one last."""
        sign = 1 if self.mode == "min" else -1
        return sorted(names, key=lambda name: _last(self.history[name], sign))

    def halve(self) -> list[str]:
        """Drop the worse half of the adapters; return those that were dropped."""
        ranked = self.ranked(self.remaining)
        kept = set(ranked[: (len(ranked) + 1) // 2])
        dropped = [name for name in self.remaining if name not in kept]
        self.remaining = [name for name in self.remaining if name in kept]
        return dropped

    def table(self) -> str:
        """Return a line for each adapter, the best one first."""
        dropped = [name for name in self.history if name not in self.remaining]
        width = max(map(len, self.history))
        lines = [f"{'adapter':<{width}}  {self.monitor:>10}  step"]
        for name in [*self.ranked(self.remaining), *self.ranked(dropped)]:
            if self.history[name]:
                step, value = self.history[name][-1]
                lines.append(f"{name:<{width}}  {value:>10.4f}  {step}{'' if name in self.remaining else ', dropped'}")
        return "\n".join(lines)

    def plot(self, path: str | Path) -> None:
        """Draw the metric of every adapter over the steps into a file. Needs matplotlib."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 4), layout="constrained")
        axes: Any = figure.subplots()
        for name, values in self.history.items():
            if values:
                is_best = name == self.best
                steps, numbers = zip(*values, strict=True)
                axes.plot(steps, numbers, marker="o", linewidth=3 if is_best else 1, label=name)
        axes.set(xlabel="optimizer step", ylabel=self.monitor)
        axes.legend()
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(path, dpi=150)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {"remaining": list(self.remaining), "history": {n: list(values) for n, values in self.history.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.remaining = list(state["remaining"])
        self.history = {
            name: [(int(step), float(v)) for step, v in values] for name, values in state["history"].items()
        }


def _last(values: Sequence[tuple[int, float]], sign: int) -> float:
    """Return the last value with a sign by which less is better; NaN and none are the worst."""
    return sign * values[-1][1] if values and not math.isnan(values[-1][1]) else math.inf
