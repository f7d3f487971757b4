"""What exists at once, counted from every operator's outputs: the same figures on any machine."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Watching(TorchDispatchMode):
    def __init__(self, wider_than: int) -> None:
        super().__init__()
        self.wider_than = wider_than
        self.largest = 0
        self.live: dict[int, int] = {}  # bytes of storages, by address of their C++ object
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {one.untyped_storage()._cdata for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)}
        results = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(results):  # a view, and what was changed in place, are in a storage that was given
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in given and self._counts(tensor):
                self._note(tensor)
        return results

    def _counts(self, tensor: Tensor) -> bool:
        return not self.wider_than or (tensor.ndim > 1 and tensor.shape[-1] > self.wider_than)

    def _note(self, tensor: Tensor) -> None:
        self.largest = max(self.largest, tensor.numel())
        storage = tensor.untyped_storage()
        self.live[storage._cdata] = storage.nbytes()
        weakref.finalize(storage, self.live.pop, storage._cdata, None)
        self.peak = max(self.peak, sum(self.live.values()))


@contextmanager
def watched(wider_than: int = 0) -> Iterator[_Watching]:
    """Count what is made inside the block, each storage once; if given, only matrices with more columns than that.

    Yields:
        ``largest``: numbers in the largest; ``peak``: bytes of all that existed at once.
    """
    with _Watching(wider_than) as watching:
        yield watching
