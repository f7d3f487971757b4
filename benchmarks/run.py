"""Measure lightning_lora beside PEFT, full fine-tuning and the frozen base: ``python benchmarks/run.py``.

Prints tables and writes ``results.json``; README.md beside this file says how to read them.
"""

import argparse
import json
import os
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import checkpoints
import counters
import injection
import steps
import tables
import timing
import torch

import lightning_lora

RESULTS = Path(__file__).with_name("results.json")
ITEMS = ("counters", "checkpoints", "injection", "steps")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", nargs="+", choices=ITEMS, default=ITEMS, help="items to measure; others stay as they were"
    )
    parser.add_argument("--rounds", type=int, default=21, help="rounds of every timing (at least 15 for a result)")
    parser.add_argument("--rounds-many", type=int, default=5, help="rounds of the injection into 18,432 layers")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = json.loads(args.output.read_text()) if args.output.exists() else {}
    measures = {
        "counters": counters.measure,
        "checkpoints": checkpoints.measure,
        "injection": lambda: injection.measure(args.rounds, args.rounds_many),
        "steps": lambda: steps.measure(args.rounds),
    }
    for item in args.only:
        start, load_before = time.time(), os.getloadavg()[0]
        measured = measures[item]()
        results[item] = {
            "environment": environment(),
            "load": [round(load_before, 2), round(os.getloadavg()[0], 2)],  # of one minute: before, after
            "wall_s": round(time.time() - start, 1),
            "results": measured,
        }
        args.output.write_text(json.dumps(_rounded(results), indent=1) + "\n")
        tables.show(item, measured)
    print(f"\nwritten to {args.output.name}")


def environment() -> dict[str, Any]:
    """Return what a figure depends on: versions, CPU, threads, protocol."""
    packages = ("torch", "peft", "transformers", "lightning")
    return {
        "versions": {
            "python": platform.python_version(),
            "lightning_lora": lightning_lora.__version__,
            **{name: version(name) for name in packages},
        },
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "protocol": (
            f"CPU time of one thread; contenders in random order inside each round, seed 0; {timing.WARM_UP_ROUNDS} "
            "rounds of warm-up dropped; ratios within a round; median and quartiles; no garbage collection"
        ),
    }


def _cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _rounded(value: Any) -> Any:
    """Return the same structure with six significant digits in every float."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


if __name__ == "__main__":
    main()
