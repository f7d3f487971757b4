"""Counting what goes between ranks."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

# FSDP2 of torch 2.13 calls the first of each pair, earlier ones the second
KINDS = {
    "all_gather": ("all_gather_single", "all_gather_into_tensor"),
    "reduce_scatter": ("reduce_scatter_single", "reduce_scatter_tensor"),
    "all_reduce": ("all_reduce",),
    "broadcast": ("broadcast",),
}


class Traffic(dict[str, list[int]]):
    """Elements of every floating point collective, by kind; of gathers, what each rank sends."""

    gathered_dtype: torch.dtype | None = None  # of the last gather


@contextmanager
def counted_collectives() -> Iterator[Traffic]:
    """Note every floating point collective inside the block."""
    sizes = Traffic({kind: [] for kind in KINDS})
    originals: dict[str, Any] = {}

    def counting(kind: str, name: str) -> Any:
        original = originals[name]

        def counted(*args: Any, **kwargs: Any) -> Any:
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
            smallest = min(tensors, key=lambda tensor: tensor.numel())
            # FSDP2 gathers bytes where dtypes differ
            if smallest.is_floating_point() or smallest.dtype == torch.uint8:
                sizes[kind].append(smallest.numel())
                if kind == "all_gather":
                    sizes.gathered_dtype = smallest.dtype
            return original(*args, **kwargs)

        return counted

    for kind, names in KINDS.items():
        for name in names:
            if hasattr(torch.distributed, name):
                originals[name] = getattr(torch.distributed, name)
                setattr(torch.distributed, name, counting(kind, name))
    try:
        yield sizes
    finally:
        for name, original in originals.items():
            setattr(torch.distributed, name, original)
