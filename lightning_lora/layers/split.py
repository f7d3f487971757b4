""":class:`SplitLinear`, the base class of linear layers of which each rank holds one part."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

from torch import Tensor, nn


class SplitLinear(nn.Module):
    """Base of ``nn.Linear``s that hold this rank's part of a weight; the other parts lie on the ranks of ``tp_group``.

    The product of the part is taken between :meth:`enter` and :meth:`leave`, which communicate.
    """

    tp_dim: ClassVar[int]  # of the weight [out_features, in_features] that is split: 0 (column-parallel) or 1 (row)
    tp_group: Any  # torch.distributed.ProcessGroup
    tp_whole_input: bool  # of a row-parallel layer: every rank gets the whole input, and takes its slice
    tp_whole_output: bool  # of a column-parallel layer: every rank returns the whole output, gathered

    def enter(self, x: Tensor) -> Tensor:
        """Return what this rank multiplies, ``[..., in_features of this rank]``."""
        raise NotImplementedError

    def leave(self, y: Tensor) -> Tensor:
        """Return the layer's output from this rank's product."""
        raise NotImplementedError

    def local_bias(self) -> Tensor | None:
        """Return the bias that is added to this rank's product, if any is."""
        raise NotImplementedError


def enter(layer: nn.Module, x: Tensor) -> Tensor:
    """Return what this rank multiplies of the input of ``layer``."""
    return layer.enter(x) if isinstance(layer, SplitLinear) else x


def leave(layer: nn.Module, y: Tensor) -> Tensor:
    """Return what ``layer`` gives of this rank's product."""
    return layer.leave(y) if isinstance(layer, SplitLinear) else y


@contextmanager
def parts_of_output(layer: nn.Module) -> Iterator[Any]:
    """Let a column-parallel layer return this rank's part of its output inside the block.

    Yields:
        The process group that the output is split over; ``None`` for a layer that is not split by rows.
    """
    if not isinstance(layer, SplitLinear) or layer.tp_dim != 0:
        yield None
        return
    former, layer.tp_whole_output = layer.tp_whole_output, False
    try:
        yield layer.tp_group
    finally:
        layer.tp_whole_output = former
