"""Step time of one decoder block: forward, and backward to the block's input and to what trains."""

from typing import Any

from blocks import QWEN3_06B, SMALL, TINY, Adapter, Shape, contenders
from timing import timed

SHORT, LONG = 64, 512
CASES: list[tuple[Shape, int, float]] = [
    (QWEN3_06B, LONG, 0.0),
    (QWEN3_06B, LONG, 0.05),
    (SMALL, LONG, 0.0),
    (SMALL, LONG, 0.05),
    (QWEN3_06B, SHORT, 0.0),
    (SMALL, SHORT, 0.0),
]
TINY_CASES: list[tuple[Shape, int, float]] = [(TINY, 8, 0.0), (TINY, 8, 0.05)]


def measure(rounds: int, quick: bool = False) -> list[dict[str, Any]]:
    """Time every case; one sample is as many steps as make some tenths of a second."""
    return [
        {"shape": shape.name, "tokens": tokens, "dropout": dropout, **time_block(shape, tokens, dropout, rounds)}
        for shape, tokens, dropout in (TINY_CASES if quick else CASES)
    ]


def time_block(shape: Shape, tokens: int, dropout: float, rounds: int) -> dict[str, Any]:
    large = shape.hidden_size * tokens >= QWEN3_06B.hidden_size * LONG // 2 or shape is TINY
    works = contenders(shape, tokens, Adapter(dropout=dropout))
    return timed({name: work.step for name, work in works.items()}, rounds, steps=1 if large else 4)
