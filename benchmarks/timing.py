"""CPU time of contenders that take turns: in random order inside each round, compared round by round."""

import gc
import random
import statistics
import time
from collections.abc import Callable, Container, Mapping
from typing import Any

import torch

WARM_UP_ROUNDS = 2
REFERENCES = ("frozen", "full", "PEFT", "ours")


def interleave(
    contenders: Mapping[str, Callable[[], float]], rounds: int, *, warm_up: int = WARM_UP_ROUNDS, seed: int = 0
) -> dict[str, list[float]]:
    """Return the seconds of each contender, one per round; those of ``warm_up`` rounds before are dropped.

    Args:
        contenders: each runs its work once and returns the seconds of its timed part (see :func:`cpu_seconds`).
    """
    order = random.Random(seed)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    frozen = gc.get_freeze_count()
    if not frozen:
        gc.collect()
        gc.freeze()  # what was imported and built so far is not looked through before every sample
    try:
        for round_number in range(-warm_up, rounds):
            for name in order.sample(list(contenders), len(contenders)):
                elapsed = contenders[name]()
                if round_number >= 0:
                    seconds[name].append(elapsed)
    finally:
        if not frozen:
            gc.unfreeze()
    return seconds


def cpu_seconds(work: Callable[[], object]) -> float:
    """Return the CPU seconds of this thread in ``work``, with the garbage collector off."""
    return _seconds(work, time.thread_time)


def wall_seconds(work: Callable[[], object]) -> float:
    """Return the seconds that ``work`` takes, of whatever threads: for work of several, on a quiet machine."""
    return _seconds(work, time.perf_counter)


def _seconds(work: Callable[[], object], clock: Callable[[], float]) -> float:
    gc.collect()
    gc.disable()
    try:
        start = clock()
        work()
        return clock() - start
    finally:
        gc.enable()


def device_seconds(work: Callable[[], object], device: str, steps: int) -> float:
    """Return the seconds of one of ``steps`` runs: between two events of a CUDA device, else of this thread's CPU."""

    def run() -> None:
        for _ in range(steps):
            work()

    if device != "cuda":
        return cpu_seconds(run) / steps
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3 / steps


def timed(works: Mapping[str, Callable[[], object]], rounds: int, *, steps: int = 1, **options: int) -> dict[str, Any]:
    """Return the :func:`summary` of works that take turns, in CPU seconds of one step of ``steps`` per sample."""

    def sample(work: Callable[[], object]) -> Callable[[], float]:
        def run() -> None:
            for _ in range(steps):
                work()

        return lambda: cpu_seconds(run) / steps

    seconds = interleave({name: sample(work) for name, work in works.items()}, rounds, **options)
    return {"steps_per_sample": steps, **summary(seconds, against=REFERENCES)}


def summary(seconds: Mapping[str, list[float]], against: Container[str] | None = None) -> dict[str, Any]:
    """Return medians and quartiles: of the seconds, and of contenders' ratios, round by round.

    Ratios are those of ours to all, and of all to those of ``against``, or to all.
    """
    return {
        "seconds": {name: quartiles(values) for name, values in seconds.items()},
        "ratios": {
            f"{a} / {b}": quartiles([x / y for x, y in zip(seconds[a], seconds[b], strict=True)])
            for a in seconds
            for b in seconds
            if a != b and (against is None or b in against or a == "ours")
        },
    }


def quartiles(values: list[float]) -> dict[str, float | int]:
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "q1": q1, "q3": q3, "n": len(values)}
