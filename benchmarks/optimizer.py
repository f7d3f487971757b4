"""Step time of AdamW over the adapters of a Qwen3-0.6B: torch's three ways and ``LoRAAdamW``, also with clipping.

``python benchmarks/optimizer.py`` prints a table. Three settings: gradients as a backward has just made them, and that
are freed before the next one, as in training; the same with two threads, in wall-clock time: the kernel shares a large
buffer out, and none of these tensors is large enough; and, with one thread, gradients that stay where they are, that is
kinder to ``foreach``: its temporaries then find memory that the process holds already.
"""

import argparse
import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
from timing import cpu_seconds, interleave, summary, wall_seconds
from torch import Tensor, nn

from lightning_lora import LoRAAdamW

BLOCKS, RANK = 28, 8
IN_OUT = ((1024, 2048), (1024, 1024), (1024, 1024), (2048, 1024), (1024, 3072), (1024, 3072), (3072, 1024))
LR, MAX_NORM = 1e-4, 1.0
AFTER, TWO_THREADS, STAY = "after a backward", "after a backward, two threads", "gradients that stay"
OURS, FLAT, FOREACH = "LoRAAdamW", "LoRAAdamW(flat)", "AdamW(foreach)"
CLIPPED = " + clipping"
KERNEL = "the kernel alone, on one buffer"  # what no step can be faster than


def measure(rounds: int, quick: bool = False) -> dict[str, Any]:
    """Return seconds a step, and ratios round by round, in both settings; 392 tensors of 5.05M elements.

    With ``quick``, of one block instead of 28.
    """
    sizes = shapes(1 if quick else BLOCKS)
    return {
        "tensors": len(sizes),
        "elements": sum(a * b for a, b in sizes),
        AFTER: summary(interleave(_works(_backward, sizes, cpu_seconds), rounds)),
        TWO_THREADS: _with_two_threads(rounds, quick),
        STAY: summary(interleave(_works(_stay, sizes, cpu_seconds), rounds)),
    }


def _with_two_threads(rounds: int, quick: bool) -> dict[str, Any]:
    """Measure in a process of its own, in which threads wait for their next piece as they do where nobody says how."""
    if (os.cpu_count() or 1) < 2:
        return {"not_measured": "one core"}
    options = ["--two-threads", "--rounds", str(rounds), *["--quick"] * quick]
    own = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "MKL_", "KMP_"))}
    run = subprocess.run([sys.executable, __file__, *options], env=own, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(run.stdout)


def shapes(num_blocks: int) -> list[tuple[int, int]]:
    """Return the shapes of A ``[r, in]`` and B ``[out, r]``, in turns, of all seven linears of all blocks."""
    pairs = [((RANK, inputs), (outputs, RANK)) for _ in range(num_blocks) for inputs, outputs in IN_OUT]
    return [shape for pair in pairs for shape in pair]


class Loss(torch.autograd.Function):
    """A loss whose backward makes gradients as adapters get them: dA as it is, dB as a transposed ``[r, out]``."""

    @staticmethod
    def forward(ctx: Any, sources: list[Tensor], *parameters: Tensor) -> Tensor:
        ctx.sources = sources
        return parameters[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Any, ...]:
        return (None, *(source.clone() if i % 2 == 0 else source.clone().t() for i, source in enumerate(ctx.sources)))


def _backward(optimizer: torch.optim.Optimizer, sources: list[Tensor]) -> None:
    optimizer.zero_grad()
    Loss.apply(sources, *optimizer.param_groups[0]["params"]).backward()


def _stay(optimizer: torch.optim.Optimizer, sources: list[Tensor]) -> None:
    if len(optimizer.state) == 0:
        _backward(optimizer, sources)
        optimizer.step()
        _backward(optimizer, sources)


def _works(
    fill: Callable[[torch.optim.Optimizer, list[Tensor]], None],
    sizes: list[tuple[int, int]],
    clock: Callable[[Callable[[], object]], float],
) -> dict[str, Callable[[], float]]:
    generator = torch.Generator().manual_seed(0)
    sources = [torch.randn(RANK, rows * columns // RANK, generator=generator) for rows, columns in sizes]
    makers: dict[str, tuple[Callable[..., torch.optim.Optimizer], dict[str, Any]]] = {
        "AdamW(for-loop)": (torch.optim.AdamW, {"foreach": False}),
        FOREACH: (torch.optim.AdamW, {"foreach": True}),
        "AdamW(fused)": (torch.optim.AdamW, {"fused": True}),
        OURS: (LoRAAdamW, {}),
        FLAT: (LoRAAdamW, {"flat": True}),
    }
    works = {}
    for name, (make, settings) in makers.items():
        for clips in (False, True):
            parameters = [nn.Parameter(torch.randn(shape, generator=generator) / 50) for shape in sizes]
            own = {"max_norm": MAX_NORM} if clips and make is LoRAAdamW else {}
            optimizer = make(parameters, lr=LR, **settings, **own)
            step: Callable[[], Any] = optimizer.step
            if clips and not own:
                step = functools.partial(_clip_and_step, parameters, step)
            fill_own = functools.partial(fill, optimizer, sources)
            works[name + CLIPPED * clips] = functools.partial(_seconds, clock, fill_own, step)
    works[KERNEL] = functools.partial(_seconds, clock, fill_own, _kernel(sum(a * b for a, b in sizes), generator))
    return works


def _kernel(size: int, generator: torch.Generator) -> Callable[[], object]:
    parameter, gradient, average, square = ([torch.randn(size, generator=generator)] for _ in range(4))
    square[0].abs_()
    settings = {"lr": LR, "beta1": 0.9, "beta2": 0.999, "weight_decay": 0.01, "eps": 1e-8}
    return functools.partial(
        torch._fused_adamw_,
        *(parameter, gradient, average, square, [], [torch.tensor(3.0)]),
        **settings,
        amsgrad=False,
        maximize=False,
        grad_scale=None,
        found_inf=None,
    )


def _clip_and_step(parameters: list[nn.Parameter], step: Callable[[], Any]) -> None:
    nn.utils.clip_grad_norm_(parameters, MAX_NORM)
    step()


def _seconds(
    clock: Callable[[Callable[[], object]], float], fill: Callable[[], None], step: Callable[[], Any]
) -> float:
    fill()
    return clock(step)


def show(results: dict[str, Any]) -> None:
    print(f"{results['tensors']} tensors, {results['elements']:,} elements; milliseconds: median (quartiles), ratio")
    for setting in (AFTER, TWO_THREADS, STAY):
        print(f"\n{setting}")
        if "not_measured" in results[setting]:
            print(f"not measured: {results[setting]['not_measured']}")
            continue
        for name, values in results[setting]["seconds"].items():
            ms = {key: 1e3 * values[key] for key in ("median", "q1", "q3")}
            base = FOREACH + CLIPPED * name.endswith(CLIPPED)
            ratio = "" if name == base else f"  {_spread(results[setting]['ratios'][f'{name} / {base}'])} of {base}"
            print(f"{name:28} {ms['median']:6.2f} ({ms['q1']:.2f} - {ms['q3']:.2f}){ratio}")


def _spread(values: dict[str, float]) -> str:
    return f"{values['median']:.3f} ({values['q1']:.3f} - {values['q3']:.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    parser.add_argument("--two-threads", action="store_true", help="that setting alone, as JSON")
    parser.add_argument("--quick", action="store_true", help="one block instead of 28")
    args = parser.parse_args()
    torch.set_num_threads(2 if args.two_threads else 1)
    if args.two_threads:
        works = _works(_backward, shapes(1 if args.quick else BLOCKS), wall_seconds)
        print(json.dumps(summary(interleave(works, args.rounds))))
        return
    results = measure(args.rounds, args.quick)
    print(json.dumps(results, indent=1)) if args.json else show(results)


if __name__ == "__main__":
    main()
