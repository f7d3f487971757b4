"""Large buffers on CPU in huge pages: a pass over them is not held up by looking up where each 4 KiB lie."""

import mmap
from contextlib import suppress

import torch
from torch import Tensor

_HUGE_PAGE_BYTES = 2 * 2**20
_MIN_BYTES = 2 * _HUGE_PAGE_BYTES


def zeros(size: int, like: Tensor) -> Tensor:
    """Return zeros ``[size]``, of the dtype and on the device of ``like``; large ones on CPU in huge pages.

    They are asked for with ``madvise``, which Linux alone has, and are given where the system allows it.
    """
    if like.device.type == "cpu" and hasattr(mmap, "MADV_HUGEPAGE") and size * like.element_size() >= _MIN_BYTES:
        return _in_huge_pages(size, like.dtype)
    return torch.zeros(size, dtype=like.dtype, device=like.device)


def _in_huge_pages(size: int, dtype: torch.dtype) -> Tensor:
    memory = mmap.mmap(-1, size * dtype.itemsize + _HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without them leaves the pages small
        memory.madvise(mmap.MADV_HUGEPAGE)
    start = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % _HUGE_PAGE_BYTES
    return torch.frombuffer(memory, dtype=dtype, count=size, offset=start)  # a new mapping is zero
