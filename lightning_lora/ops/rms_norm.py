"""Root mean square normalization with a frozen weight, which keeps its output for backward and not its input.

The adapted layers behind a norm keep its output anyway, as their input: kept once, it serves both.
"""

from typing import Any

import torch
from torch import Tensor

from lightning_lora.ops.linear import apply


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, is_offset: bool = False) -> Tensor:
    """Return ``w * x / sqrt(mean(x^2) + eps)`` over the last dimension (Zhang & Sennrich 2019), for a frozen ``w``.

    Computed in float32 (float64 stays) and rounded where the models round: before the weight's product, as Llama's, or
    after it with ``1 + w`` in the place of w, as Gemma's. Kept for backward are the output and one number per row.

    Args:
        x: ``[..., features]``.
        weight: ``[features]``, without zeros (or minus ones, with ``is_offset``): backward divides by it.
        is_offset: whether it is Gemma's form.
    """
    y: Tensor = apply(_RMSNorm, x, weight, eps, is_offset)[0]
    return y


class _RMSNorm(torch.autograd.Function):
    """``(y, rstd)``; both are differentiable, so that backward, which is made of them, is too."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, eps: float, is_offset: bool) -> tuple[Tensor, Tensor]:
        wide = _wide(x)
        rstd = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)  # [..., 1]
        y = wide * rstd
        if is_offset:
            return (y * _factor(weight, y.dtype, is_offset)).to(x.dtype), rstd
        return weight * y.to(x.dtype), rstd

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _, weight, _, ctx.is_offset = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*output, weight)
        ctx.dtype = inputs[0].dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_rstd: Tensor | None) -> tuple[Tensor | None, ...]:
        # with n = x * rstd and y = w n:  dx = rstd * (w dy - n * mean(dy y)),  and  d rstd / dx = -rstd^2 n / features
        y, rstd, weight = ctx.saved_tensors
        w, wide = _factor(weight, rstd.dtype, ctx.is_offset), _wide(y)
        normalized = wide / w
        grad_x = None
        if grad is not None:
            grad = grad.to(rstd.dtype)
            projection = (grad * wide).mean(-1, keepdim=True)
            if torch.is_grad_enabled():
                grad_x = (grad * w - normalized * projection) * rstd
            else:
                grad_x = (grad * w).addcmul_(normalized, projection, value=-1).mul_(rstd)
        if grad_rstd is not None:
            through_rstd = normalized * (grad_rstd * rstd.square() / -y.shape[-1])
            grad_x = through_rstd if grad_x is None else grad_x + through_rstd
        return None if grad_x is None else grad_x.to(ctx.dtype), None, None, None


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _factor(weight: Tensor, dtype: torch.dtype, is_offset: bool) -> Tensor:
    """Return what the normalized input is multiplied by, ``[features]``."""
    return 1.0 + weight.to(dtype) if is_offset else weight.to(dtype)
