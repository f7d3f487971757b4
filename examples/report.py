"""What the quickstart shows: its tables, its plot, and the loss that the plot draws."""

import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

import lightning as L
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn
from transformers.utils.logging import disable_progress_bar

from lightning_lora import named_adapter_parameters


@dataclass
class Evaluation:
    """How well the held-out nouns are defined."""

    perplexity: float
    definitions: list[str]


class LossHistory(L.Callback):
    """Remember the training loss of every step."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *_: Any) -> None:
        self.losses.append(outputs["loss"].item())


class Report:
    """Print the results and draw the plot into a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.console = Console(highlight=False)
        self.start = monotonic()
        folder.mkdir(parents=True, exist_ok=True)

    def stage(self, title: str) -> None:
        self.console.rule(f"[bold]{title}[/bold]  {monotonic() - self.start:.0f} s", align="left")

    def sizes(self, num_base: int, model: nn.Module, checkpoint: Path, weights: Path) -> None:
        adapters = [parameter for _, parameter in named_adapter_parameters(model)]
        trainable, trained_bytes = (
            sum(values) for values in zip(*((p.numel(), p.nbytes) for p in adapters), strict=True)
        )
        total, base_bytes = num_base + trainable, sum(p.nbytes for p in model.parameters()) - trained_bytes
        table = Table("", "parameters", "in memory", "file", "size")
        table.add_row("base, frozen", f"{num_base:,}", size(base_bytes), weights.name, megabytes(weights))
        table.add_row(
            "adapters, trained", f"{trainable:,}", size(trained_bytes), checkpoint.name, megabytes(checkpoint)
        )
        self.console.print(table)
        self.console.print(
            f"{trainable / total:.1%} of all parameters train; the checkpoint holds their Adam moments too."
        )

    def comparison(self, held_out: Sequence[Sequence[str]], before: Evaluation, after: Evaluation) -> None:
        table = Table("held out", "before", "after", "WordNet", show_lines=True)
        table.add_row("perplexity", f"{before.perplexity:.1f}", f"{after.perplexity:.1f}", "", style="bold")
        for (noun, gloss), old, new in zip(held_out, before.definitions, after.definitions, strict=False):
            table.add_row(noun, one_line(old), one_line(new), escape(gloss))
        self.console.print(table)

    def equal(self, what: str, logits: Tensor, expected: Tensor) -> None:
        """Print how far two models' logits are apart, and insist that it is float32 rounding."""
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-3)
        self.console.print(f"{what}: logits differ by at most {(logits - expected).abs().max():.1e}")

    def plot(self, losses: Sequence[float], before: float, after: float, resumed_at: int) -> None:
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(2, 1))
        left.plot(range(1, len(losses) + 1), losses, color="tab:blue")
        left.axvline(resumed_at + 0.5, color="gray", linestyle="--")
        left.annotate(
            "resumed",
            (resumed_at + 0.5, 1),
            (4, -4),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            va="top",
            color="gray",
        )
        left.set(title="Training loss", xlabel="optimizer step", ylabel="nats per token", ylim=(0, None))
        bars = right.bar(("before", "after"), (before, after), color=("tab:gray", "tab:blue"))
        right.bar_label(bars, fmt="%.1f")
        right.set(title="Held-out perplexity")
        for axes in (left, right):
            axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(self.folder / "quickstart.png", dpi=150)

    def end(self) -> None:
        folder = self.folder.relative_to(Path.cwd()) if self.folder.is_relative_to(Path.cwd()) else self.folder
        self.console.print(f"Done after {monotonic() - self.start:.0f} s; plot, checkpoint, PEFT directory: {folder}")


def tidy_output() -> None:
    """Silence advice that does not apply here and third-party deprecations that a user can do nothing about."""
    warnings.filterwarnings("ignore", "The '\\w+' does not have many workers")  # 2,000 short lines need none
    warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")  # it is resumed from
    warnings.filterwarnings("ignore", ".isinstance\\(treespec, LeafSpec\\)", FutureWarning)  # lightning's use of torch
    warnings.filterwarnings("ignore", ".set_vital. is deprecated", UserWarning)  # torchdata's use of torch
    advice = ("GPU available", "TPU available", "\N{ELECTRIC LIGHT BULB} Tip", "`Trainer.fit` stopped")
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    logger.addFilter(lambda record: not record.getMessage().startswith(advice))
    disable_progress_bar()  # transformers' own, for loading


def megabytes(path: Path) -> str:
    return size(path.stat().st_size)


def size(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.1f} MB"


def one_line(text: str) -> str:
    return escape(" ".join(text.split()))
