"""Measure lightning_lora beside PEFT, other peers, full fine-tuning and the frozen base: ``python benchmarks/run.py``.

Prints tables and writes ``results.json``; README.md beside this file says how to read them.
"""

import argparse
import gc
import importlib
import inspect
import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import environment
import tables
import targets
import torch

RESULTS = Path(__file__).with_name("results.json")
QUICK_RESULTS = Path(__file__).with_name("quick.json")
# module: rounds of its timing by default, as many as the time allows for; 0 where it counts
ITEMS = {
    "counters": 0,
    "aten_kernels": 0,
    "checkpoints": 0,
    "memory": 0,
    "steps": 15,
    "whole_step": 9,
    "moe": 15,
    "loss": 5,
    "injection": 15,
    "decode": 15,
    "compiled": 15,
    "scaling": 7,
    "ablation": 15,
    "four_bit": 9,
    "streaming": 0,
    "gpu": 20,
}
QUICK_ROUNDS = 2


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    record: dict[str, Any] = json.loads(options.output.read_text()) if options.output.exists() else {}
    for item in options.only:
        asked = QUICK_ROUNDS if options.quick else options.rounds or ITEMS[item]
        rounds = asked if ITEMS[item] else 0
        record[item] = measured(item, rounds, options.quick)
        record["targets"] = targets.judge(
            {
                name: {"not_measured": "tiny sizes are not judged"} if is_quick(entry) else entry["results"]
                for name, entry in record.items()
                if name in ITEMS
            }
        )
        write(options.output, record)
        tables.show(item, record[item]["results"])
    tables.show("targets", record["targets"])
    print(f"\nwritten to {options.output.name}")


def is_quick(entry: dict[str, Any]) -> bool:
    return bool(entry.get("quick"))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=ITEMS, default=[*ITEMS], help="items; others stay as they were")
    parser.add_argument("--rounds", type=int, help="rounds of every timing, instead of each item's own number")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that all of it runs: no figure counts")
    parser.add_argument("--output", type=Path, help=f"{RESULTS.name}, or {QUICK_RESULTS.name} with --quick")
    options = parser.parse_args(arguments)
    options.output = options.output or (QUICK_RESULTS if options.quick else RESULTS)
    return options


def measured(item: str, rounds: int, quick: bool) -> dict[str, Any]:
    """Return an item's results with what they depend on; a module that is not there is a result too."""
    torch.set_num_threads(1)
    start, cpu_start, load_before = time.time(), time.process_time(), environment.load()
    print(f"{item} ...", flush=True)
    try:
        module = importlib.import_module(item)
    except ModuleNotFoundError as error:
        if error.name != item:
            raise
        results: Any = {"not_measured": f"benchmarks/{item}.py is not there"}
    else:
        results = _undisturbed(module.measure, rounds, quick)
    return {
        "commit": environment.commit(),
        "environment": environment.environment(),
        "quick": quick,
        "rounds": rounds,
        "load": [load_before, environment.load()],  # of one minute: before, after
        "uptime_s": environment.uptime_s(),
        "wall_s": round(time.time() - start, 1),
        "cpu_s": round(time.process_time() - cpu_start, 1),
        "results": results,
    }


def _undisturbed(measure: Callable[..., Any], rounds: int, quick: bool) -> Any:
    """Measure, with what was imported out of the garbage collector's sight: it is a second's work to look through."""
    if quick and "quick" not in inspect.signature(measure).parameters:
        return {"not_measured": "it has no quick mode"}
    gc.collect()
    gc.freeze()
    try:
        return measure(rounds, quick) if quick else measure(rounds)
    finally:
        gc.unfreeze()


def write(path: Path, record: dict[str, Any]) -> None:
    """Write JSON with a line per statistic, and all of it or nothing."""
    text = json.dumps(_rounded(record), indent=1)
    text = re.sub(r'\{\s+("median"[^{}]*?)\s+\}', lambda found: "{" + re.sub(r"\s+", " ", found[1]) + "}", text)
    scratch = path.with_suffix(".part")
    scratch.write_text(text + "\n")
    scratch.replace(path)


def _rounded(value: Any) -> Any:
    """Return the same structure with six significant digits in every float."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


if __name__ == "__main__":
    main()
