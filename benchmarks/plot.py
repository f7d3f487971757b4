"""Draw ``results.png`` and ``scaling.png`` from ``results.json``: ``python benchmarks/plot.py``."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter, NullLocator

HERE = Path(__file__).parent
COLORS = {
    "frozen": "#9aa0a6",
    "frozen, fused": "#c4c7cb",
    "full": "#c9a227",
    "PEFT": "#4c78a8",
    "ours": "#d1495b",
    "LitGPT": "#72b7b2",
    "torchtune": "#8a6fae",
    "NeMo Automodel": "#6b8f3c",
}
LABELS = {"frozen": "frozen base", "full": "full fine-tuning", "ours": "lightning_lora"}
MB = 1e6
Results = dict[str, Any]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=HERE / "results.json")
    parser.add_argument("--output", type=Path, default=HERE, help="folder for the pictures")
    options = parser.parse_args(arguments)
    record = json.loads(options.results.read_text())
    results = {item: entry["results"] for item, entry in record.items() if item != "targets"}
    plt.rcParams.update(
        {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left"}
    )
    draw_results(results, options.output / "results.png")
    draw_scaling(results, options.output / "scaling.png")


def draw_results(results: Results, path: Path) -> None:
    """Draw step time, peak memory and checkpoint size side by side."""
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.2), width_ratios=[1.6, 1, 1], layout="constrained")
    panels = (("steps", draw_steps), ("memory", draw_memory), ("checkpoints", draw_checkpoints))
    for axis, (item, draw) in zip(axes, panels, strict=True):
        _draw(axis, draw, results, item)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=8, frameon=False)
    _save(figure, path)


def _draw(axis: Axes, draw: Callable[[Axes, Any], None], results: Results, item: str) -> None:
    found = results.get(item, {"not_measured": ""})
    if isinstance(found, dict) and "not_measured" in found:
        axis.set_axis_off()
        axis.text(0.5, 0.5, f"{item}: not measured", ha="center")
    else:
        draw(axis, found)


def draw_steps(axis: Axes, steps: list[Results]) -> None:
    """Draw medians as bars and quartiles as whiskers, full-length sequences only."""
    cases = [case for case in steps if case["tokens"] == max(c["tokens"] for c in steps)]
    groups = [f"{case['shape']}\ndropout {case['dropout']:g}" for case in cases]
    present = [name for name in COLORS if name != "frozen" and all(f"{name} / frozen" in c["ratios"] for c in cases)]
    width = 0.85 / len(present)
    for index, name in enumerate(present):
        ratios = [case["ratios"][f"{name} / frozen"] for case in cases]
        medians = [ratio["median"] for ratio in ratios]
        whiskers = [[r["median"] - r["q1"] for r in ratios], [r["q3"] - r["median"] for r in ratios]]
        places = [group + (index - (len(present) - 1) / 2) * width for group in range(len(groups))]
        drawn = axis.bar(
            *(places, medians, 0.93 * width),
            yerr=whiskers,
            color=COLORS[name],
            label=LABELS.get(name, name),
            error_kw={"elinewidth": 0.8},
        )
        values = [f"{median:.2f}" for median in medians]
        axis.bar_label(drawn, values, label_type="center", color="white", fontsize=7, rotation=90)
    axis.axhline(1, color=COLORS["frozen"], linewidth=1.2, label=LABELS["frozen"])
    axis.set_xticks(range(len(groups)), groups)
    axis.set_ylim(bottom=0)
    axis.set_title(f"Step of a block / frozen base (T={cases[0]['tokens']}, fp32, CPU)")


def draw_memory(axis: Axes, memory: Results) -> None:
    """Draw the live storage of a whole step at its peak, and what of it is there before the step."""
    rows = {
        "frozen": ("frozen", "frozen base"),
        "full": ("full", "full fine-tuning"),
        "PEFT": ("PEFT", "PEFT"),
        "PEFT, best, learned positions": ("PEFT", "PEFT, logits of\nlearned positions"),
        "ours": ("ours", "lightning_lora"),
    }
    found = memory["peak_bytes"]
    labels, colors = [label for _, label in rows.values()], [COLORS[color] for color, _ in rows.values()]
    bars = axis.barh(labels, [found[name]["peak"] / MB for name in rows], color=colors)
    axis.barh(labels, [found[name]["before"] / MB for name in rows], color="white", alpha=0.35)
    axis.bar_label(bars, [f"{found[name]['peak'] / MB:,.0f} MB" for name in rows], padding=3)
    axis.set_xlim(right=1.25 * max(found[name]["peak"] for name in rows) / MB)
    axis.invert_yaxis()
    axis.set_title(f"Peak memory of a step, {memory['model'].split(',')[0]}\n(pale: there before the step)")


def draw_checkpoints(axis: Axes, checkpoints: Results) -> None:
    """Draw checkpoints that a run resumes from, on a logarithmic scale."""
    sizes = checkpoints["bytes"]
    rows = {
        "full fine-tuning": ("full", sizes["Lightning, full fine-tuning, with optimizer"]),
        "PEFT in a\nLightningModule": ("PEFT", sizes["Lightning, PEFT inside, with optimizer"]),
        "lightning_lora": ("ours", sizes["ours, with optimizer"]),
        "lightning_lora,\nweights only": ("ours", sizes["ours"]),
    }
    values = [size / MB for _, size in rows.values()]
    bars = axis.barh(list(rows), values, color=[COLORS[name] for name, _ in rows.values()])
    axis.bar_label(bars, [f"{value:,.0f} MB" for value in values], padding=3)
    axis.set_xscale("log")
    axis.set_xlim(min(values) / 5, 8 * max(values))
    axis.invert_yaxis()
    axis.set_title(f"Checkpoint, {checkpoints['model'].split(',')[0]}\n(r={checkpoints['rank']}, logarithmic)")


def draw_scaling(results: Results, path: Path) -> None:
    """Draw the four curves of step cost, each with the line of the floating-point operations."""
    points = results.get("scaling", [])
    figure, axes = plt.subplots(1, 4, figsize=(14, 3.8), layout="constrained", sharey=True)
    for axis, curve in zip(axes, ("rank", "layers", "tokens", "hidden size"), strict=True):
        _draw(axis, draw_curve, {curve: [p for p in points if p["curve"] == curve]} if points else {}, curve)
    axes[0].set_ylabel("step time / frozen base")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False)
    _save(figure, path)


def draw_curve(axis: Axes, points: list[Results]) -> None:
    values = [point["value"] for point in points]
    for name in ("full", "PEFT", "ours", "frozen, fused"):
        ratios = [point["ratios"][f"{name} / frozen"] for point in points]
        style = {"color": COLORS[name], "label": LABELS.get(name, name)}
        axis.plot(values, [ratio["median"] for ratio in ratios], marker="o", markersize=3, **style)
        axis.fill_between(values, [r["q1"] for r in ratios], [r["q3"] for r in ratios], color=COLORS[name], alpha=0.15)
    line = [point["theoretical"] for point in points]
    axis.plot(values, line, color="black", linestyle="--", linewidth=1, label="LoRA by FLOPs: 1 + 1.5 r (1/in + 1/out)")
    axis.axhline(1, color=COLORS["frozen"], linewidth=1, label=LABELS["frozen"])
    axis.set_xscale("log", base=2)
    axis.set_xticks(values, [str(value) for value in values])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_minor_formatter(NullFormatter())
    fixed = {name: points[0][name] for name in ("shape", "tokens", "rank", "layers") if _is_fixed(name, points)}
    axis.set_title(f"{points[0]['curve']}\n" + ", ".join(f"{name} {value}" for name, value in fixed.items()))


def _is_fixed(name: str, points: list[Results]) -> bool:
    return len({point[name] for point in points}) == 1 and name != points[0]["curve"]


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=150, metadata={"Software": None})
    plt.close(figure)


if __name__ == "__main__":
    main()
