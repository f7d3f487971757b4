"""torch.compile: blocks compiled one by one, as is usual: step time beside eager, graphs, and recompilations."""

import os
import tempfile
import time
import warnings
from typing import Any
from unittest.mock import patch

import torch
import torch._dynamo
from blocks import SMALL, TINY, Adapter, Shape, Work, contenders
from timing import timed
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

NUM_LAYERS, TOKENS = 3, 256
NAMES = ("frozen", "PEFT", "ours")


class Stack(nn.Module):
    """Equal blocks, one after the other."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: torch.Tensor, position_embeddings: Any) -> torch.Tensor:
        for block in self.blocks:
            x = block(x, position_embeddings=position_embeddings)
        return x


def measure(rounds: int, quick: bool = False) -> dict[str, Any]:
    """Compile and time, with nothing of earlier runs in the cache of compiled code."""
    with tempfile.TemporaryDirectory() as directory, patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=directory):
        return _measured(rounds, quick)


def _measured(rounds: int, quick: bool) -> dict[str, Any]:
    shape, tokens, backend = (TINY, 8, "aot_eager") if quick else (SMALL, TOKENS, "inductor")
    works: dict[str, Work] = {}
    compiling: dict[str, Any] = {}
    for name in NAMES:
        works[name] = _stack(name, shape, tokens)
        compiled = _stack(name, shape, tokens)
        try:
            compiling[name] = _compile(compiled, backend)
            works[f"{name}, compiled"] = compiled
        except Exception as error:  # no C++ compiler, say: the reason is the result
            compiling[name] = {"not_measured": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
    found = timed({name: work.step for name, work in works.items()}, rounds)
    pairs = {name: f"{name}, compiled" for name in NAMES if f"{name}, compiled" in works}
    agree = all(
        torch.allclose(works[one].step().detach(), works[other].step().detach(), rtol=1e-3, atol=1e-3)
        for one, other in pairs.items()
    )
    case = {"shape": shape.name, "layers": NUM_LAYERS, "tokens": tokens, "backend": backend}
    return {**case, "outputs_agree": agree, "compiling": compiling, **found}


def _stack(name: str, shape: Shape, tokens: int) -> Work:
    made = contenders(shape, tokens, Adapter(), names=[name])[name]
    others = [contenders(shape, tokens, Adapter(), names=[name])[name].block for _ in range(NUM_LAYERS - 1)]
    return Work(Stack([made.block, *others]), made.x, made.grad, made.rotary)


def _compile(work: Work, backend: str) -> dict[str, Any]:
    """Compile every block of the stack, run two steps, and return what that took: graphs of all blocks and seconds."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    for block in work.block.blocks:
        block.compile(backend=counter)
    start = time.thread_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        work.step()
    seconds, graphs = time.thread_time() - start, counter.frame_count
    work.step()
    return {
        "layers": NUM_LAYERS,
        "graphs": graphs,
        "graphs_after_a_second_step": counter.frame_count,
        "compile_cpu_s": seconds,
    }
