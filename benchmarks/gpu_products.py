"""The products of rank r of one adapted layer, each alone, in the layouts and orders that there are to choose from."""

from collections.abc import Callable
from typing import Any

import torch
from blocks import Shape
from timing import device_seconds, interleave, summary


def time_products(shape: Shape, tokens: int, r: int, device: str, rounds: int, steps: int) -> dict[str, Any]:
    """Time the up projection's products of ``tokens`` rows; ``base`` is its large product alone."""
    works = products(shape.hidden_size, shape.intermediate_size, tokens, r, device)
    seconds = interleave(
        {name: lambda work=work: device_seconds(work, device, steps) for name, work in works.items()}, rounds
    )
    case = {"shape": shape.name, "tokens": tokens, "in": shape.hidden_size, "out": shape.intermediate_size, "rank": r}
    return {**case, **summary(seconds, against=("base",))}


def products(inputs: int, outputs: int, tokens: int, r: int, device: str) -> dict[str, Callable[[], Any]]:
    """Return u, v, dA and dB with r on either side, and the base's product alone, before and after the adapter's."""
    dtype = torch.bfloat16
    x, dy = (torch.randn(tokens, size, device=device).to(dtype) for size in (inputs, outputs))
    W = torch.randn(outputs, inputs, device=device).to(dtype)
    A, B = torch.randn(r, inputs, device=device).to(dtype), torch.randn(outputs, r, device=device).to(dtype)
    u, v = x @ A.t(), dy @ B
    uT, vT = u.t().contiguous(), v.t().contiguous()
    wide = device == "cuda" and hasattr(torch.ops.aten.mm, "dtype")  # products written in float32
    return {
        "base": lambda: x @ W.t(),
        "base, then u B^T added": lambda: (x @ W.t()).addmm_(u, B.t(), alpha=2.0),
        "u B^T, then base with beta=1": lambda: torch.addmm(u.new_empty(()), u, B.t(), beta=0, alpha=2.0).addmm_(
            x, W.t()
        ),
        "base + scaled u B^T, three kernels": lambda: x @ W.t() + (u @ B.t()) * 2.0,
        "u, r last": lambda: x @ A.t(),
        "u, r first": lambda: A @ x.t(),
        "v, r last": lambda: dy @ B,
        "v, r first": lambda: B.t() @ dy.t(),
        "dA, of v with r last": lambda: v.t() @ x,
        "dA, of v with r first": lambda: vT @ x,
        "dB, r last": lambda: dy.t() @ u,
        "dB, r first": lambda: uT @ dy,
        "dB, r last, float32 out": (lambda: torch.mm(dy.t(), u, out_dtype=torch.float32))
        if wide
        else (lambda: (dy.t() @ u).float()),
    }
