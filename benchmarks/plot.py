"""Draw ``results.png`` from ``results.json``: ``python benchmarks/plot.py``."""

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

HERE = Path(__file__).parent
COLORS = {"frozen": "#9aa0a6", "full": "#c9a227", "PEFT": "#4c78a8", "ours": "#d1495b"}
LABELS = {"frozen": "frozen base", "full": "full fine-tuning", "PEFT": "PEFT", "ours": "lightning_lora"}
MB = 1e6


def main() -> None:
    results = {item: entry["results"] for item, entry in json.loads((HERE / "results.json").read_text()).items()}
    plt.rcParams.update(
        {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left"}
    )
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.2), width_ratios=[1.5, 1, 1.1], layout="constrained")
    draw_steps(axes[0], results["steps"])
    draw_saved(axes[1], results["counters"])
    draw_checkpoints(axes[2], results["checkpoints"]["bytes"])
    figure.legend(*axes[1].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(HERE / "results.png", dpi=150, metadata={"Software": None})


def draw_steps(axis: Axes, steps: list[dict[str, Any]]) -> None:
    """Draw medians as bars and quartiles as whiskers, full-length sequences only."""
    cases = [case for case in steps if case["tokens"] == max(c["tokens"] for c in steps)]
    groups = [f"{case['shape']}\ndropout {case['dropout']:g}" for case in cases]
    bars = {name: [case["ratios"][f"{name} / frozen"] for case in cases] for name in ("full", "PEFT", "ours")}
    for index, (name, ratios) in enumerate(bars.items()):
        medians = [ratio["median"] for ratio in ratios]
        whiskers = [[r["median"] - r["q1"] for r in ratios], [r["q3"] - r["median"] for r in ratios]]
        places = [group + (index - 1) * 0.27 for group in range(len(groups))]
        drawn = axis.bar(places, medians, 0.25, yerr=whiskers, color=COLORS[name], error_kw={"elinewidth": 0.8})
        axis.bar_label(drawn, [f"{median:.2f}" for median in medians], label_type="center", color="white", fontsize=8)
    axis.axhline(1, color=COLORS["frozen"], linewidth=1.2)
    axis.set_xticks(range(len(groups)), groups)
    axis.set_ylim(bottom=0)
    axis.set_title(f"Step time / frozen base (T={cases[0]['tokens']}, fp32, CPU)")


def draw_saved(axis: Axes, counts: list[dict[str, Any]]) -> None:
    """Draw the bytes that one block keeps for backward."""
    cases = [(case["dtype"], case["dropout"], case["saved_bytes"]) for case in counts]
    for index, name in enumerate(("frozen", "full", "PEFT", "ours")):
        places = [group + (index - 1.5) * 0.2 for group in range(len(cases))]
        axis.bar(places, [sizes[name] / MB for _, _, sizes in cases], 0.19, color=COLORS[name], label=LABELS[name])
    for group, (_, _, sizes) in enumerate(cases):
        best = sizes.get("PEFT, bf16 adapters")  # PEFT's defaults are its best on float32
        if best is not None:
            label = "PEFT with bf16 adapters" if group == len(cases) - 1 else None
            axis.plot([group, group + 0.2], [best / MB] * 2, color="black", linewidth=1.5, label=label)
    short = {"float32": "fp32", "bfloat16": "bf16"}
    axis.set_xticks(
        range(len(cases)), [f"{short[dtype]}\ndropout {dropout:g}" for dtype, dropout, _ in cases], fontsize=8
    )
    axis.set_title("Saved activations of a Qwen3-0.6B block, MB")


def draw_checkpoints(axis: Axes, sizes: dict[str, int]) -> None:
    """Draw checkpoints that a run resumes from, on a logarithmic scale."""
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
    axis.set_xlim(1, 8e3)
    axis.invert_yaxis()
    axis.set_title("Checkpoint, SmolLM2-135M shape, r=8 (log)")


if __name__ == "__main__":
    main()
