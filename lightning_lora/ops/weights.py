"""Merged weights ``W + scaling * B A``: the sum, the norms of its rows, and outputs scaled by row (DoRA)."""

import torch
from torch import Tensor


def merged_weight(
    weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, *, ratio: Tensor | None = None
) -> Tensor:
    """Return ``W + scaling * B A``, summed in float32 or wider and rounded once to W's dtype.

    Args:
        weight: ``[out_features, in_features]``
        lora_A: ``[r, in_features]``
        lora_B: ``[out_features, r]``
        ratio: ``[out_features]``, what each row of the sum is multiplied by before it is rounded.
    """
    dtype = torch.promote_types(torch.promote_types(lora_A.dtype, weight.dtype), torch.float32)
    delta = (lora_B.to(dtype) @ lora_A.to(dtype)) * scaling
    merged = weight + delta.to(weight.device)
    if ratio is not None:
        merged = ratio.to(weight.device)[:, None] * merged
    return merged.to(weight.dtype)


@torch.no_grad()
def row_norms(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """Return the norms of the rows of ``W + scaling * B A``, ``[out_features]``, in float32 or wider: a constant.

    The sum is made and dropped: on CPU norms by products of rank r take 0.7 to 1.2 of its time, and they lose the
    digits of rows in which the update cancels W. A row of zeros has the smallest positive norm, so that its ratio is
    finite.

    Args:
        weight: ``[out_features, in_features]``
        lora_A: ``[r, in_features]``
        lora_B: ``[out_features, r]``
    """
    dtype = torch.promote_types(torch.promote_types(lora_A.dtype, weight.dtype), torch.float32)
    with torch.autocast(weight.device.type, enabled=False):
        total = torch.addmm(weight.to(dtype), lora_B.to(dtype), lora_A.to(dtype), alpha=scaling)
    norms: Tensor = torch.linalg.vector_norm(total, dim=1)
    # forward-mode AD and traces do not see no_grad
    return norms.clamp_min(torch.finfo(dtype).tiny).detach()


def rescaled(y: Tensor, ratio: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``ratio * (y - b) + b`` in the dtype of ``y``, computed in ``ratio``'s: equal to ``y`` where it is 1.

    Args:
        y: ``[..., out_features]``, or any shape that the others broadcast against.
    """
    offset = torch.zeros_like(ratio) if bias is None else (1 - ratio) * bias
    return torch.addcmul(offset, y, ratio).to(y.dtype)
