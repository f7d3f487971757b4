"""Many small tensors as pieces of one buffer: the state of an optimizer, made, counted up and saved together."""

from collections.abc import Sequence

import torch
from torch import Tensor

# pieces begin where a cache line does, and where vector instructions may load
_ALIGNMENT_BYTES = 64


def zeros_together(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return a contiguous zero tensor for each of ``tensors``, all of one dtype and device, in one new buffer."""
    if not tensors:
        return []
    unit = max(_ALIGNMENT_BYTES // tensors[0].element_size(), 1)
    sizes = [-(-tensor.numel() // unit) * unit for tensor in tensors]
    flat = torch.zeros(sum(sizes), dtype=tensors[0].dtype, device=tensors[0].device)
    pieces = flat.split(sizes)
    return [piece[: tensor.numel()].view(tensor.shape) for piece, tensor in zip(pieces, tensors, strict=True)]


def together(counts: Sequence[Tensor], device: torch.device) -> tuple[Tensor, list[Tensor]]:
    """Copy numbers into one float32 buffer ``[len(counts)]`` on ``device``: to count all up is one addition.

    Returns:
        The buffer, and its elements as tensors without dimensions.
    """
    flat = torch.stack([count.detach().reshape(()).to(device, torch.float32) for count in counts])
    return flat, list(flat.unbind())
