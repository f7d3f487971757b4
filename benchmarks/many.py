"""Several adapters on one block: one step over the rows of all, beside a step for each, and one adapter on all rows."""

from typing import Any

from blocks import QWEN3_06B, TARGETS, TINY, Adapter, Shape, Work, contenders, fill_adapters, with_ours, with_peft
from timing import timed

from lightning_lora import LoRAConfig, active, add_adapter

CASES = [(k, tokens) for k in (2, 4, 8, 16) for tokens in (16, 64, 256, 512)]
QUICK = [(2, 4)]


def measure(rounds: int, quick: bool = False) -> list[dict[str, Any]]:
    shape, cases = (TINY, QUICK) if quick else (QWEN3_06B, CASES)
    return [_measured(shape, k, tokens, rounds) for k, tokens in cases]


def _measured(shape: Shape, k: int, tokens: int, rounds: int) -> dict[str, Any]:
    adapter, names = Adapter(), [f"adapter_{i}" for i in range(k)]
    builders = {"ours": with_ours, "PEFT": with_peft}
    one = contenders(shape, tokens, adapter, builders=builders, names=["ours"], batch=k)
    row = contenders(shape, tokens, adapter, builders=builders)
    joint = contenders(shape, tokens, adapter, names=["frozen"], batch=k)["frozen"]
    for name in names:
        add_adapter(joint.block, name, LoRAConfig(r=adapter.r, alpha=adapter.alpha, target_modules=TARGETS))
    fill_adapters(joint.block, shape, adapter)
    works = {
        "ours": lambda: _step(joint, names),
        "one adapter": one["ours"].step,
        "separate": lambda: [row["ours"].step() for _ in names],
        "PEFT, separate": lambda: [row["PEFT"].step() for _ in names],
    }
    steps = max(1, 2048 // (k * tokens) // 2)
    return {"shape": shape.name, "adapters": k, "tokens": tokens, **timed(works, rounds, steps=steps)}


def _step(work: Work, names: list[str]) -> None:
    with active(work.block, names):
        work.step()
