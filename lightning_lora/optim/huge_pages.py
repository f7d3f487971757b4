"""Large buffers on CPU in huge pages: a pass over them is not held up by looking up where each 4 KiB lie."""

import ctypes
import mmap
import sys

import torch
from torch import Tensor

_MIN_BYTES = 4 * 2**20  # two huge pages
_MADV_HUGEPAGE = 14  # of Linux, which alone has them


def zeros(size: int, like: Tensor) -> Tensor:
    """Return zeros ``[size]``, of the dtype and on the device of ``like``; large ones on CPU in huge pages.

    The allocator's memory, of which the system is told with ``madvise`` before it is touched; it may not follow.
    """
    buffer = torch.empty(size, dtype=like.dtype, device=like.device)
    if sys.platform == "linux" and type(buffer) is Tensor and buffer.device.type == "cpu":
        _advise(buffer.data_ptr(), size * buffer.element_size())
    return buffer.zero_()


def _advise(address: int, num_bytes: int) -> None:
    first = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (address + num_bytes - first) // mmap.PAGESIZE * mmap.PAGESIZE
    if num_bytes >= _MIN_BYTES:
        # an error changes nothing: a system without huge pages leaves them small
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), _MADV_HUGEPAGE)
