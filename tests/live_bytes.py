"""What exists at once, counted from every operator's outputs: the same figures on any machine."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Watching(TorchDispatchMode):
    """Notes the outputs whose last dimension is ``size``, and no other tensors."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.rows = 0
        self.live: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        for tensor in [] if func.is_view else tree_leaves(results):
            if isinstance(tensor, Tensor) and tensor.ndim == 2 and tensor.shape[1] == self.size:
                self._note(tensor)
        return results

    def _note(self, tensor: Tensor) -> None:
        self.rows = max(self.rows, tensor.shape[0])
        storage = tensor.untyped_storage()
        if storage._cdata not in self.live:
            self.live[storage._cdata] = storage.nbytes()
            weakref.finalize(storage, self.live.pop, storage._cdata)
        self.peak = max(self.peak, sum(self.live.values()))


@contextmanager
def watched(size: int) -> Iterator[_Watching]:
    """Count the matrices with ``size`` columns that are made inside the block, each storage once.

    Yields:
        ``rows``: of the largest; ``peak``: bytes of all that existed at once.
    """
    with _Watching(size) as watching:
        yield watching
