"""What exists at once, counted from every operator's outputs: the same figures on any machine."""

import weakref
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_lora.ops.sharded import local_part


class _Watching(TorchDispatchMode):
    def __init__(self, wider_than: int, ignored_bytes: Collection[int]) -> None:
        super().__init__()
        self.wider_than, self.ignored_bytes = wider_than, ignored_bytes
        self.largest = 0
        self.live: dict[int, Any] = {}  # weak references of storages, by address of their C++ object
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {one.untyped_storage()._cdata for one in _tensors((args, kwargs))}
        results = func(*args, **(kwargs or {}))
        for tensor in _tensors(results):  # a view, and what was changed in place, are in a storage that was given
            if tensor.untyped_storage()._cdata not in given and self._counts(tensor):
                self._note(tensor)
        return results

    def _counts(self, tensor: Tensor) -> bool:
        if tensor.untyped_storage().nbytes() in self.ignored_bytes:
            return False
        return not self.wider_than or (tensor.ndim > 1 and tensor.shape[-1] > self.wider_than)

    def _note(self, tensor: Tensor) -> None:
        self.largest = max(self.largest, tensor.numel())
        storage = tensor.untyped_storage()
        self.live[storage._cdata] = weakref.ref(storage)
        weakref.finalize(storage, self.live.pop, storage._cdata, None)
        held = [reference() for reference in self.live.values()]  # FSDP2 frees what it gathered, and keeps the storage
        self.peak = max(self.peak, sum(one.nbytes() for one in held if one is not None))


def _tensors(tree: Any) -> Iterator[Tensor]:
    """Yield what has memory on this rank: of a DTensor its part, as its own storage has the size of the whole."""
    yield from (local_part(leaf) for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


@contextmanager
def watched(wider_than: int = 0, ignored_bytes: Collection[int] = ()) -> Iterator[_Watching]:
    """Count what is made inside the block, each storage once; if given, only matrices with more columns than that.

    Args:
        ignored_bytes: sizes of storages that are not counted, such as those of files that are mapped and not read.

    Yields:
        ``largest``: numbers in the largest; ``peak``: bytes of all that existed at once.
    """
    with _Watching(wider_than, ignored_bytes) as watching:
        yield watching
