"""What can be counted instead of timed: activation bytes kept for backward, and aten kernels, of one decoder block."""

from typing import Any

import torch
from blocks import (
    LLAMA_32_1B,
    QWEN3_06B,
    SMOLLM2_135M,
    TINY,
    TINY_LLAMA,
    Adapter,
    Shape,
    Work,
    contenders,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

F32, BF16 = torch.float32, torch.bfloat16
# all that is kept grows with the tokens, and kernels do not: the large shape needs no more of them
CASES: list[tuple[Shape, int, torch.dtype]] = [
    (QWEN3_06B, 512, F32),
    (LLAMA_32_1B, 128, F32),
    (SMOLLM2_135M, 512, F32),
    (QWEN3_06B, 512, BF16),
]
TINY_CASES: list[tuple[Shape, int, torch.dtype]] = [(TINY, 16, F32), (TINY_LLAMA, 16, BF16)]
# neither reads nor writes elements
NO_KERNEL = {"aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::_unsafe_view"}


def measure(rounds: int, quick: bool = False) -> list[dict[str, Any]]:
    """Count once: figures repeat, so ``rounds`` has no say."""
    results = []
    for shape, tokens, dtype in TINY_CASES if quick else CASES:
        for dropout in (0.0, 0.05):
            works = contenders(shape, tokens, Adapter(dropout=dropout), dtype)
            results.append(
                {
                    "shape": shape.name,
                    "tokens": tokens,
                    "dtype": str(dtype).removeprefix("torch."),
                    "dropout": dropout,
                    "saved_bytes": {name: saved_bytes(work) for name, work in works.items()},
                    "kernels": {name: kernels(work) for name, work in works.items()},
                }
            )
    return results


def saved_bytes(work: Work) -> int:
    """Return the bytes that autograd keeps between forward and backward, each storage once, parameters left out."""
    kept: list[Tensor] = []  # alive until counted, so that no address is used twice

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = work.forward()
    parameters = {p.untyped_storage().data_ptr() for p in work.block.parameters()}
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    del output
    return sum(size for address, size in storages.items() if address not in parameters)


def kernels(work: Work) -> int:
    """Return how many aten operators that touch elements run in forward and backward, gradient sums included."""
    work.clear()
    with KernelCount() as count:
        work.step()
    return count.total


class KernelCount(TorchDispatchMode):
    """Count the operators inside the block that touch elements: neither views nor empty tensors."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.total += not (func.is_view or func._schema.name in NO_KERNEL)
        return func(*args, **(kwargs or {}))
