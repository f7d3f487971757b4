"""Multiply all experts in one grouped kernel, which reads the numbers of rows on the device: CUDA in bfloat16."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lora.ops.experts.records import ExpertWeights, Gradients, Groups

_ALIGNED = 8  # the kernels want rows of whole 16 bytes


def takes(rows: Tensor, *sizes: int) -> bool:
    """Whether the kernels take rows of a device and dtype, and matrices of these sizes."""
    device = rows.device
    return (
        device.type == "cuda"
        and hasattr(F, "grouped_mm")
        and rows.dtype == torch.bfloat16
        and torch.cuda.get_device_capability(device) >= (8, 0)
        and all(size % _ALIGNED == 0 for size in sizes)
    )


def dispatch(tokens: Tensor, groups: Groups) -> Tensor:
    """Return what :func:`forward` and :func:`backward` take for each row's token."""
    return groups.dispatch(tokens)


def forward(rows: Tensor, groups: Groups, layer: ExpertWeights) -> tuple[Tensor, Tensor | None]:
    """Return ``y = x W_e^T + scaling * u B_e^T``, ``[S, out]``, and ``u = x A_e^T``, ``[S, r]`` with r rounded up."""
    assert isinstance(layer.weight, Tensor)
    dtype = rows.dtype
    y = _product(rows, layer.weight.to(dtype).mT, groups)
    if layer.lora_A is None or layer.lora_B is None:
        return y, None
    A, B = _padded(layer.lora_A, layer.lora_B, dtype)
    u = _product(rows, A.mT, groups)
    return y.add_(_product(u, B.mT, groups), alpha=layer.scaling), u


def backward(
    grad: Tensor,
    rows: Tensor,
    u: Tensor | None,
    groups: Groups,
    layer: ExpertWeights,
    needs: tuple[bool, bool, bool],
    factors: Tensor | None,
) -> Gradients:
    """Return what :func:`lightning_lora.ops.experts.loop.backward` does."""
    need_x, need_A, need_B = needs
    dx = dA = dB = None
    assert isinstance(layer.weight, Tensor)
    if need_x:
        dx = _product(grad, layer.weight.to(grad.dtype), groups)
    if layer.lora_A is None or layer.lora_B is None:
        return Gradients(dx, None, None)
    r = layer.lora_A.shape[1]
    A, B = _padded(layer.lora_A, layer.lora_B, grad.dtype)
    if need_x or need_A:
        v = _product(grad, B, groups)  # [S, r]
        if dx is not None:
            dx.add_(_product(v, A, groups), alpha=layer.scaling)
        if need_A:
            v = v if factors is None else v.mul_(factors)
            dA = _product(v.t(), rows, groups)[:, :r].to(layer.lora_A.dtype).mul_(layer.scaling)
    if need_B:
        assert u is not None
        dB = _product(grad.t(), u, groups)[..., :r].to(layer.lora_B.dtype).mul_(layer.scaling)
    return Gradients(dx, dA, dB)


def _product(left: Tensor, right: Tensor, groups: Groups) -> Tensor:
    kernel: Any = F.grouped_mm
    product: Tensor = kernel(left, right, offs=groups.ends)
    return product


def _padded(lora_A: Tensor, lora_B: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    spare = -lora_A.shape[1] % _ALIGNED
    A, B = lora_A.to(dtype), lora_B.to(dtype)
    return (F.pad(A, (0, 0, 0, spare)), F.pad(B, (0, spare))) if spare else (A, B)
