"""CPU time of contenders that take turns: in random order inside each round, compared round by round."""

import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

WARM_UP_ROUNDS = 2


def interleave(contenders: Mapping[str, Callable[[], float]], rounds: int, seed: int = 0) -> dict[str, list[float]]:
    """Return the seconds of each contender, one per round.

    Args:
        contenders: each runs its work once and returns the seconds of its timed part (see :func:`cpu_seconds`).
    """
    order = random.Random(seed)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for round_number in range(-WARM_UP_ROUNDS, rounds):
        for name in order.sample(list(contenders), len(contenders)):
            elapsed = contenders[name]()
            if round_number >= 0:
                seconds[name].append(elapsed)
    return seconds


def cpu_seconds(work: Callable[[], object]) -> float:
    """Return the CPU seconds of this thread in ``work``, with the garbage collector off."""
    gc.collect()
    gc.disable()
    try:
        start = time.thread_time()
        work()
        return time.thread_time() - start
    finally:
        gc.enable()


def summary(seconds: Mapping[str, list[float]]) -> dict[str, Any]:
    """Return medians and quartiles: of the seconds, and of every contender's ratio to every other, round by round."""
    return {
        "seconds": {name: quartiles(values) for name, values in seconds.items()},
        "ratios": {
            f"{a} / {b}": quartiles([x / y for x, y in zip(seconds[a], seconds[b], strict=True)])
            for a in seconds
            for b in seconds
            if a != b
        },
    }


def quartiles(values: list[float]) -> dict[str, float | int]:
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "q1": q1, "q3": q3, "n": len(values)}
