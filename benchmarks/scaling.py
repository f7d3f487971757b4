"""How the cost of LoRA grows: step time over the frozen base against rank, layers, tokens and hidden size.

Beside the measured ratio stands the theoretical one, of floating-point operations of the linear layers: LoRA adds
``1.5 r (1/in + 1/out)`` of a layer's forward and input gradient, averaged over the block by the layers' own work.
"""

from dataclasses import replace
from typing import Any

from blocks import SMALL, TINY, Adapter, Shape, Work, contenders
from compiled import Stack
from timing import timed

NAMES = ("frozen", "frozen, fused", "full", "PEFT", "ours")
TOKENS = 256
RANKS = (4, 8, 16, 32, 64, 128, 256)
LAYERS = (1, 2, 4, 8)
NUM_TOKENS = (32, 64, 128, 256, 512, 1024)
HIDDEN = (256, 512, 1024, 2048)


def theoretical(shape: Shape, r: int) -> float:
    """Return FLOPs of a LoRA step over those of the frozen base: ``1 + 1.5 r sum(in + out) / sum(in * out)``."""
    pairs = shape.linears()
    return 1 + 1.5 * r * sum(i + o for i, o in pairs) / sum(i * o for i, o in pairs)


def sized(hidden: int) -> Shape:
    """Return a block in the proportions of ``SMALL``."""
    return replace(
        SMALL,
        name=f"h={hidden}",
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_heads=hidden // 64,
        num_key_value_heads=hidden // 128,
    )


def measure(rounds: int, quick: bool = False) -> list[dict[str, Any]]:
    """Return one entry per point of each of the four curves."""
    base = TINY if quick else SMALL
    tokens = 8 if quick else TOKENS
    points = [("rank", r, base, tokens, r, 1) for r in ((2,) if quick else RANKS)]
    points += [("layers", n, base, tokens, 8, n) for n in ((2,) if quick else LAYERS)]
    points += [("tokens", t, base, t, 8, 1) for t in ((4,) if quick else NUM_TOKENS)]
    points += [("hidden size", h, sized(h), tokens, 8, 1) for h in ((128,) if quick else HIDDEN)]
    return [_point(*point, rounds) for point in points]


def _point(curve: str, value: int, shape: Shape, tokens: int, r: int, layers: int, rounds: int) -> dict[str, Any]:
    stacks = [contenders(shape, tokens, Adapter(r), names=NAMES) for _ in range(layers)]
    works = {
        name: Work(Stack([stack[name].block for stack in stacks]), one.x, one.grad, one.rotary)
        for name, one in stacks[0].items()
    }
    work = shape.hidden_size**2 * tokens * layers
    steps = 1 if shape is TINY else max(1, SMALL.hidden_size**2 * TOKENS // work)
    found = timed({name: one.step for name, one in works.items()}, rounds, steps=min(steps, 4))
    case = {"curve": curve, "value": value, "shape": shape.name, "tokens": tokens, "rank": r, "layers": layers}
    return {**case, "theoretical": theoretical(shape, r), **found}
