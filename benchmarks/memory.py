"""Peak memory of one whole training step of a SmolLM2-135M shape: every live storage, tracked operator by operator.

Deterministic: what PyTorch's operators allocate on CPU, parameters and optimizer moments included, whatever the
machine. What a kernel uses inside itself is not seen.
"""

import gc
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from whole_step import Contender, base_of, batch_like_quickstart, contenders, model_config

SAME_AS_PEFT = "PEFT, best"  # but for the kernel of AdamW


class LiveStorage(TorchDispatchMode):
    """The largest sum of bytes of storages that were alive at once, those of ``known`` tensors included."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = self.now = 0
        for tensor in known:
            self._see(tensor)

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        reference = StorageWeakRef(storage)
        if reference.cdata not in self._alive:
            self._alive[reference.cdata] = (reference, storage.nbytes())
            self.now += storage.nbytes()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        if self.now > self.peak:  # only then does it matter which are gone
            self.sweep()
            self.peak = max(self.peak, self.now)
        return output

    def sweep(self) -> None:
        """Leave out of ``now`` what has been freed."""
        for cdata, (reference, size) in list(self._alive.items()):
            if reference.expired():
                del self._alive[cdata]
                self.now -= size


def measure(rounds: int, quick: bool = False) -> dict[str, Any]:
    """Track one step of every contender, after a short one that makes its moments; ``rounds`` has no say."""
    config = model_config(quick)
    batch = batch_like_quickstart(config.vocab_size)
    peaks = {}
    for name, build in contenders(base_of(config), batch).items():
        if name == SAME_AS_PEFT:
            continue
        peaks[name] = peak_of(build())
        gc.collect()
    tokens = list(batch["input_ids"].shape)
    return {"model": f"{'tiny' if quick else 'SmolLM2-135M'} shape, float32", "batch": tokens, "peak_bytes": peaks}


def peak_of(contender: Contender) -> dict[str, int]:
    """Return the peak of a step, and what of it is there before: parameters, moments, gradients of the step before."""
    whole, contender.batch = contender.batch, {name: tensor[:1] for name, tensor in contender.batch.items()}
    contender.step()
    contender.batch = whole
    moments = [value for state in contender.states() for value in state.values() if isinstance(value, Tensor)]
    tensors = [*contender.model.parameters(), *contender.model.buffers(), *moments]
    tensors += [p.grad for p in contender.model.parameters() if p.grad is not None]
    gc.disable()  # nothing is to go at a moment of the collector's choice
    try:
        with LiveStorage(tensors) as live:
            before = live.now
            contender.step()
    finally:
        gc.enable()
    return {"peak": live.peak, "before": before}
