"""What each fusion is worth: one block with all of them, without one of them, and with none.

``python benchmarks/run.py --only ablation``. A fusion stays while, alone, it saves 2 % of a step, or 10 % of the bytes
kept for backward, or 10 % of the bytes that kernels read and write.
"""

from collections.abc import Iterator
from typing import Any

import blocks
import moe
import torch
from blocks import QWEN3_06B, SMALL, TINY, Adapter, Shape, Work
from counters import NO_KERNEL, kernels, saved_bytes
from timing import timed
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_lora import LoRAConfig, inject
from lightning_lora.fuse import FUSIONS, fuse

TOKENS = 512
CASES: list[tuple[Shape, int, float]] = [
    (shape, TOKENS, dropout) for shape in (SMALL, QWEN3_06B) for dropout in (0.0, 0.05)
]
TINY_CASES: list[tuple[Shape, int, float]] = [(TINY, 8, 0.0), (TINY, 8, 0.05)]
# figure: the share of it that a fusion has to save
WORTH = {"step": 0.02, "saved_bytes": 0.10, "moved_bytes": 0.10}


def measure(rounds: int, quick: bool = False) -> list[dict[str, Any]]:
    """Time and count every case: decoder blocks without experts, and mixtures of experts, which take no dropout."""
    works = [
        ({"case": f"{shape.name}, T={tokens}", "dropout": dropout}, _of_block(shape, tokens, dropout), _steps(shape))
        for shape, tokens, dropout in (TINY_CASES if quick else CASES)
    ]
    mixtures = moe.CASES[:1] if quick else [moe.CASES[0], moe.CASES[2]]
    works += [({"case": case.name, "dropout": 0.0}, _of_mixture(case), case.steps) for case in mixtures]
    return [{**case, **_measured(contenders, steps, rounds)} for case, contenders, steps in works]


def _steps(shape: Shape) -> int:
    return 1 if shape in (QWEN3_06B, TINY) else 4


def _measured(works: dict[str, Work], steps: int, rounds: int) -> dict[str, Any]:
    figures = {"saved_bytes": saved_bytes, "kernels": kernels, "moved_bytes": moved_bytes}
    counted = {figure: {name: count(work) for name, work in works.items()} for figure, count in figures.items()}
    times = timed({name: work.step for name, work in works.items()}, rounds, steps=steps)
    return {**counted, **times, "worth": _worth(counted, times["ratios"])}


def _variants(names: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield what a contender is called, and which fusions it has. ``ours`` has all."""
    yield "ours", list(FUSIONS)
    for name in names:
        yield f"without {name}", [other for other in FUSIONS if other != name]
    if len(names) > 1:
        yield "none", []


def _of_block(shape: Shape, tokens: int, dropout: float) -> dict[str, Work]:
    adapter = Adapter(dropout=dropout)
    settings = {"r": adapter.r, "alpha": adapter.alpha, "dropout": dropout, "target_modules": blocks.TARGETS}
    builders: dict[str, blocks.Builder] = {
        name: lambda block, _, fusions=fusions: _with_fusions(block, settings, fusions)  # type: ignore[misc]
        for name, fusions in _variants([name for name in FUSIONS if name != "experts"])
    }
    return blocks.contenders(shape, tokens, adapter, builders={"frozen": blocks.frozen, **builders})


def _of_mixture(case: moe.Case) -> dict[str, Work]:
    torch.manual_seed(0)
    base = moe.Qwen3MoeSparseMoeBlock(case.config())
    for parameter in base.parameters():
        nn.init.normal_(parameter, std=0.02)
    settings = {"r": moe.RANK, "alpha": moe.ALPHA, "target_modules": [], "target_parameters": moe.PARAMETERS}
    models = {"frozen": blocks.sharing_copy(base).requires_grad_(False)}
    for name, fusions in _variants(["experts"]):
        models[name] = _with_fusions(blocks.sharing_copy(base), settings, fusions)
        for key, parameter in models[name].named_parameters():
            if "lora_" in key:
                nn.init.normal_(parameter, std=0.02, generator=torch.Generator().manual_seed(1))
    x = torch.randn(1, moe.TOKENS, case.hidden_size)
    grad = torch.randn_like(x)
    works = {name: moe.Work(block.train(), x.clone().requires_grad_(), grad, ()) for name, block in models.items()}
    blocks.check_agreement({name: work for name, work in works.items() if name != "frozen"})
    return works


def _with_fusions(block: nn.Module, settings: dict[str, Any], fusions: list[str]) -> nn.Module:
    inject(block, LoRAConfig(**settings, fuse=False))
    fuse(block, fusions)
    return block


def _worth(counted: dict[str, dict[str, int]], ratios: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Return which share of each figure a fusion saves, by what the block is without it."""
    return {
        name: {
            "step": 1 - ratios[f"ours / {name}"]["median"],
            **{figure: 1 - found["ours"] / found[name] for figure, found in counted.items()},
        }
        for name in counted["kernels"]
        if name not in ("frozen", "ours")
    }


def moved_bytes(work: Work) -> int:
    """Return the bytes of all that kernels read and write in forward and backward, as if there were no caches."""
    work.clear()
    with MovedBytes() as count:
        work.step()
    return count.total


class MovedBytes(TorchDispatchMode):
    """Add up the sizes of what operators that touch elements take and give."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not (func.is_view or func._schema.name in NO_KERNEL):
            leaves = [one for one in tree_leaves((args, kwargs, result)) if isinstance(one, Tensor)]
            self.total += sum(one.nbytes for one in leaves)
        return result
