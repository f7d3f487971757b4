"""The same comparisons on a CUDA device, bfloat16: products of rank r, blocks, whole steps, memory, longest sequence.

Where there is none the result says so; with ``quick`` the code runs all the same, on CPU and tiny sizes.
"""

import gc
from collections.abc import Callable
from typing import Any

import torch
from blocks import QWEN3_06B, TINY, Adapter, Shape, builders_of, contenders
from gpu_products import time_products
from timing import device_seconds, interleave, summary
from torch import nn
from transformers import Qwen3ForCausalLM
from whole_step import Batch
from whole_step import contenders as whole_contenders

QWEN3_17B = Shape("Qwen3-1.7B", 2048, 6144, 16, 8, 128)
QWEN3_4B = Shape("Qwen3-4B", 2560, 9728, 32, 8, 128)
ROUNDS, STEPS = 5, 20
# shape, batch, sequence length, rank, dropout
BLOCKS: list[tuple[Shape, int, int, int, float]] = [
    (QWEN3_4B, 4, 2048, 8, 0.0),
    (QWEN3_4B, 4, 2048, 8, 0.05),
    (QWEN3_4B, 1, 8192, 8, 0.0),
    (QWEN3_4B, 4, 2048, 64, 0.0),
    (QWEN3_17B, 4, 2048, 8, 0.0),
    (QWEN3_06B, 4, 2048, 8, 0.0),
    (QWEN3_06B, 1, 2048, 16, 0.0),
]
TINY_BLOCKS: list[tuple[Shape, int, int, int, float]] = [(TINY, 2, 8, 4, 0.0), (TINY, 1, 8, 4, 0.05)]
MODEL = {"num_hidden_layers": 28, "vocab_size": 151_936, "tie_word_embeddings": True}
TINY_MODEL = {"num_hidden_layers": 2, "vocab_size": 64, "tie_word_embeddings": True}
LONGEST, UNIT = 1 << 17, 1024  # tokens: the limit of the search, and what it is exact to
SEARCHED = ("full", "PEFT, best", "ours")


def measure(rounds: int, quick: bool = False) -> dict[str, Any]:
    if not (torch.cuda.is_available() or quick):
        return {"not_measured": "there is no CUDA device here"}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rounds, steps = (rounds, 1) if quick else (min(rounds, ROUNDS), STEPS)
    shape, model = (TINY, TINY_MODEL) if quick else (QWEN3_06B, MODEL)
    products = [(TINY, 16, 4)] if quick else [(one, 8192, r) for one in (QWEN3_06B, QWEN3_4B) for r in (8, 64)]
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu, to see that it runs",
        "products": [time_products(*case, device, rounds, steps) for case in products],
        "blocks": [_block(*case, device, rounds, steps) for case in (TINY_BLOCKS if quick else BLOCKS)],
        "whole_step": _whole_step(shape, model, (2, 8) if quick else (4, 2048), device, rounds, steps),
        "longest_sequence": _longest(shape, model, device, *((8, 8) if quick else (LONGEST, UNIT))),
    }


def _block(
    shape: Shape, batch: int, length: int, r: int, dropout: float, device: str, rounds: int, steps: int
) -> dict[str, Any]:
    works, failed = {}, {}
    for name in builders_of(torch.bfloat16):
        try:  # one at a time: kernels of a peer may not run on this device
            one = contenders(
                shape, length, Adapter(r, dropout), torch.bfloat16, names=[name], device=device, batch=batch
            )
            one[name].step()
            works.update(one)
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    case = {"shape": shape.name, "batch": batch, "length": length, "rank": r, "dropout": dropout, "failed": failed}
    if dropout == 0.0 and {"PEFT", "ours"} <= works.keys():
        with torch.no_grad():
            difference = works["ours"].forward() - works["PEFT"].forward()
        case["largest_difference_to_PEFT"] = difference.abs().max().item()
    steppers = {name: work.step for name, work in works.items()}
    return {**case, "peak_bytes": _peaks(steppers, device), **_timed(steppers, device, rounds, steps)}


def _timed(works: dict[str, Callable[[], Any]], device: str, rounds: int, steps: int) -> dict[str, Any]:
    samples = {name: lambda work=work: device_seconds(work, device, steps) for name, work in works.items()}
    return summary(interleave(samples, rounds), against=("frozen", "full", "PEFT", "PEFT, bf16 adapters", "PEFT, best"))


def _peaks(works: dict[str, Callable[[], Any]], device: str) -> dict[str, int]:
    """Return what one step allocates at most beyond what lies there before; nothing on CPU, which does not count it."""
    if device != "cuda":
        return {}
    peaks = {}
    for name, work in works.items():
        work()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        peaks[name] = torch.cuda.max_memory_allocated() - before
    return peaks


def _model(shape: Shape, settings: dict[str, Any], device: str) -> nn.Module:
    torch.manual_seed(0)
    config = shape.config(**settings)
    with torch.device(device):
        return Qwen3ForCausalLM(config).to(torch.bfloat16).train()


def _batch(vocab_size: int, size: tuple[int, int], device: str) -> Batch:
    ids = torch.randint(0, vocab_size, size, generator=torch.Generator().manual_seed(0)).to(device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def _whole_step(
    shape: Shape, settings: dict[str, Any], size: tuple[int, int], device: str, rounds: int, steps: int
) -> dict[str, Any]:
    batch = _batch(settings["vocab_size"], size, device)
    built = {name: build() for name, build in whole_contenders(_model(shape, settings, device), batch).items()}
    works = {name: one.step for name, one in built.items()}
    case = {"shape": shape.name, "batch": size[0], "length": size[1]}
    return {**case, "peak_bytes": _peaks(works, device), **_timed(works, device, rounds, max(1, steps // 4))}


def _longest(shape: Shape, settings: dict[str, Any], device: str, limit: int, unit: int) -> dict[str, int]:
    """Return the longest sequence of a whole step that fits on the device, by bisection to ``unit`` tokens."""
    found = {}
    for name in SEARCHED:
        low, high = 0, limit // unit + 1
        while high - low > 1:
            middle = (low + high) // 2
            if _fits(name, shape, settings, device, middle * unit):
                low = middle
            else:
                high = middle
        found[name] = low * unit
    return {"limit": limit, **found}


def _fits(name: str, shape: Shape, settings: dict[str, Any], device: str, length: int) -> bool:
    try:
        batch = _batch(settings["vocab_size"], (1, length), device)
        base = _model(shape, {**settings, "max_position_embeddings": length}, device)
        contender = whole_contenders(base, batch)[name]()
        for _ in range(2):
            contender.step()
        return True
    except torch.OutOfMemoryError:
        return False
    finally:
        contender = base = None
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
