"""The targets, each read from the results: met, missed, or not measured."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Results = dict[str, Any]  # by item, what its measure() returned
Quartiles = dict[str, float]


@dataclass(frozen=True)
class Target:
    """A limit on figures of the results: the largest of them counts.

    Attributes:
        row: its number in the table.
        figures: returns numbers, or medians with quartiles; raises KeyError or IndexError where they are not there.
        is_equality: whether the figure is to be the limit, that is inside its own spread, instead of at most that.
    """

    row: str
    what: str
    limit: float
    item: str
    figures: Callable[[Any], list[float | Quartiles]]
    is_equality: bool = False


def judge(results: Results) -> list[dict[str, Any]]:
    """Return a line per target: what was asked, what was measured, and ``met``, ``missed`` or ``not measured``."""
    return [_line(target, results) for target in TARGETS]


def _line(target: Target, results: Results) -> dict[str, Any]:
    line: dict[str, Any] = {"row": target.row, "what": target.what, "target": target.limit, "item": target.item}
    reason = f"{target.item} has not been run"
    try:
        found = results[target.item]
        reason = f"{target.item} has no such figure"
        reason = found.get("not_measured", reason) if isinstance(found, dict) else reason
        worst = max((_quartiles(figure) for figure in target.figures(found)), key=lambda one: one["median"])
    except (KeyError, IndexError, TypeError, ValueError):
        return {**line, "measured": None, "status": "not measured", "reason": reason}
    within = worst["q1"] <= target.limit if target.is_equality else worst["median"] <= target.limit
    return {**line, "measured": worst, "status": "met" if within else "missed"}


def _quartiles(figure: float | Quartiles) -> Quartiles:
    return figure if isinstance(figure, dict) else {"median": figure, "q1": figure, "q3": figure, "n": 1}


def _step(dropout: float, ratio: str) -> Callable[[Any], list[Any]]:
    def figures(steps: Any) -> list[Any]:
        return [
            case["ratios"][ratio]
            for case in steps
            if (case["shape"], case["tokens"], case["dropout"]) == ("Qwen3-0.6B", 512, dropout)
        ]

    return figures


def _saved(dropout: float, *shapes: str) -> Callable[[Any], list[Any]]:
    def figures(counters: Any) -> list[Any]:
        return [
            case["saved_bytes"]["ours"] / case["saved_bytes"]["PEFT"]
            for case in counters
            if case["dropout"] == dropout and case["dtype"] == "float32" and case["shape"] in shapes
        ]

    return figures


def _kernels(llama_like: bool) -> Callable[[Any], list[Any]]:
    name = "linears of a Llama-like block"
    return lambda counts: [row["ours"] for one, row in counts.items() if (one == name) == llama_like]


def _mixtures(figure: Callable[[Any], Any], *names: str) -> Callable[[Any], list[Any]]:
    def figures(cases: Any) -> list[Any]:
        mixtures = [case for case in cases if case["case"].startswith("mixture")]
        return [figure(case) for case in mixtures if not names or any(name in case["case"] for name in names)]

    return figures


def _recompilations(compiled: Any) -> list[float]:
    ours = compiled["compiling"]["ours"]
    return [max(ours["graphs"], ours["graphs_after_a_second_step"])]


def _saved_over_nf4(results: Any) -> list[float]:
    return [results["saved_bytes"]["ours"] / results["saved_bytes"]["PEFT"]]


LLAMAS = ("Llama-3.2-1B", "SmolLM2-135M")
TARGETS = [
    Target("1", "step of a Qwen3-0.6B block / frozen", 1.06, "steps", _step(0.0, "ours / frozen")),
    Target("1", "the same, dropout 0.05", 1.12, "steps", _step(0.05, "ours / frozen")),
    Target("2", "whole quickstart step / PEFT", 0.85, "whole_step", lambda r: [r["ratios"]["ours / PEFT"]]),
    Target("2", "the same / PEFT at its best", 0.85, "whole_step", lambda r: [r["ratios"]["ours / PEFT, best"]]),
    Target("3", "saved activations / PEFT, Llama-3.2-1B and SmolLM2", 0.60, "counters", _saved(0.0, *LLAMAS)),
    Target("3", "the same, dropout 0.05", 0.40, "counters", _saved(0.05, *LLAMAS)),
    Target("3", "the same of Qwen3-0.6B, which has norms of q and k", 0.60, "counters", _saved(0.0, "Qwen3-0.6B")),
    Target("3", "the same, dropout 0.05", 0.40, "counters", _saved(0.05, "Qwen3-0.6B")),
    Target("4", "aten kernels, linears of a Llama-like block", 60, "aten_kernels", _kernels(True)),
    Target("4", "aten kernels, any other block", 75, "aten_kernels", _kernels(False)),
    Target(
        *("5", "MoE layer, forward and backward / full, experts of 256x96", 0.75, "moe"),
        _mixtures(lambda case: case["ratios"]["ours / full"], "h=256"),
    ),
    Target(
        *("5", "the same, experts of 512x384", 0.75, "moe"),
        _mixtures(lambda case: case["ratios"]["ours / full"], "h=512"),
    ),
    Target(
        *("5", "the same, experts of 1024x768", 0.75, "moe"),
        _mixtures(lambda case: case["ratios"]["ours / full"], "h=1024"),
    ),
    Target(
        *("5", "the same, experts of 2048x768, as Qwen3-30B-A3B's", 0.75, "moe"),
        _mixtures(lambda case: case["ratios"]["ours / full"], "h=2048"),
    ),
    Target(
        *("5", "MoE layer, step with optimizer / full, experts of 256x96", 0.75, "moe"),
        _mixtures(lambda case: case["with_optimizer"]["ratios"]["ours / full"], "h=256"),
    ),
    Target(
        *("5", "the same, experts of 512x384 and larger", 0.75, "moe"),
        _mixtures(lambda case: case["with_optimizer"]["ratios"]["ours / full"], "h=512", "h=1024", "h=2048"),
    ),
    Target(
        *("5", "MoE saved activations / PEFT", 0.50, "moe"),
        _mixtures(lambda case: case["saved_bytes"]["ours"] / case["saved_bytes"]["PEFT"]),
    ),
    Target(
        "6",
        "memory of the loss / full logits, V=150k",
        0.05,
        "loss",
        lambda r: [case["of_full_logits"]["ours"] for case in r["memory"]],
    ),
    Target("8", "injection / PEFT", 0.10, "injection", lambda cases: [c["ratios"]["ours / PEFT"] for c in cases]),
    Target("9", "decoding, merged / base", 1.0, "decode", lambda r: [r["ratios"]["ours, merged / frozen"]], True),
    Target("10", "compiled / eager", 1.0, "compiled", lambda r: [r["ratios"]["ours, compiled / ours"]]),
    Target("10", "graphs of equal compiled blocks", 1, "compiled", _recompilations),
    Target(
        "11", "step over NF4 / PEFT on bitsandbytes, SmolLM2", 0.85, "four_bit", lambda r: [r["ratios"]["ours / PEFT"]]
    ),
    Target("11", "the same / our step over float32", 1.15, "four_bit", lambda r: [r["ratios"]["ours / ours, float32"]]),
    Target("11", "saved activations over NF4 / PEFT", 0.56, "four_bit", _saved_over_nf4),
    Target(
        *("12", "held while 1 GB streams to 2 ranks / (own share + largest unit)", 1.05, "streaming"),
        lambda r: [rank["ratio"] for rank in r["ranks"]],
    ),
]
