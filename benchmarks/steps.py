"""Step time of one decoder block: forward, and backward to the block's input and to what trains."""

import functools
from typing import Any

from blocks import QWEN3_06B, SMALL, Shape, Work, contenders
from timing import cpu_seconds, interleave, summary

SHORT, LONG = 64, 512
CASES: list[tuple[Shape, int, float]] = [
    (QWEN3_06B, LONG, 0.0),
    (QWEN3_06B, LONG, 0.05),
    (SMALL, LONG, 0.0),
    (SMALL, LONG, 0.05),
    (QWEN3_06B, SHORT, 0.0),
    (QWEN3_06B, SHORT, 0.05),
    (SMALL, SHORT, 0.0),
    (SMALL, SHORT, 0.05),
]


def measure(rounds: int) -> list[dict[str, Any]]:
    """Time every case; one sample is as many steps as make a few tenths of a second."""
    return [
        {"shape": shape.name, "tokens": tokens, "dropout": dropout, **time_block(shape, tokens, dropout, rounds)}
        for shape, tokens, dropout in CASES
    ]


def time_block(shape: Shape, tokens: int, dropout: float, rounds: int) -> dict[str, Any]:
    steps = max(1, (LONG // tokens) * (QWEN3_06B.hidden_size // shape.hidden_size))
    works = contenders(shape, tokens, dropout)
    seconds = interleave({name: functools.partial(_seconds, work, steps) for name, work in works.items()}, rounds)
    per_step = {name: [value / steps for value in values] for name, values in seconds.items()}
    return {"steps_per_sample": steps, **summary(per_step)}


def _seconds(work: Work, steps: int) -> float:
    def run() -> None:
        for _ in range(steps):
            work.step()

    return cpu_seconds(run)
