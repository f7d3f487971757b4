"""The tensor math of LoRA: no modules, no process groups.

x [..., in] ---- W [out, in] frozen ------------- + --> y [..., out]
     \\                                            |
      dropout -- A [r, in] -- h [..., r] -- B [out, r] * scaling
"""

import functools
import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# odd multipliers of 32-bit integer mixers (Wellons' "lowbias32" search) that fit a signed 32-bit integer
_MIX_1 = 0x21F0AAAD
_MIX_2 = 0x735A2D97
_GOLDEN = 0x1E3779B97F4A7C15


def lora_linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    scaling: float,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    columns: tuple[int, int] | None = None,
    first_row: int = 0,
) -> Tensor:
    """Return ``x W^T + b + scaling * dropout(x) A^T B^T`` (Hu et al. 2021, sec. 4.1) and save little for backward.

    Kept for backward are ``x`` and ``h = x A^T`` (r numbers per token), beside the parameters themselves. ``x`` is
    never cast up: A and B are cast to its dtype, their gradients come back in their own. Under autocast the product
    runs in autocast's dtype, as ``F.linear`` does.

    Args:
        x: ``[..., in_features]``, any number of leading dimensions, also none or empty ones.
        weight: ``[out_features, in_features]``, or ``None`` for the adapter's term alone.
        bias: ``[out_features]`` or ``None``.
        lora_A: ``[r, in_features]``.
        lora_B: ``[out_features, r]``.
        scaling: factor of the adapter's term.
        dropout: probability of dropping an entry of ``x`` on the adapter's path.
        seed: scalar integer tensor that decides which entries are dropped; ``None`` drops none. The mask is a hash of
            it and of the position, so that backward makes it again instead of storing it.
        columns: where ``x`` is a slice of features, the position of its first one and the number of all, so that the
            mask is that slice of the whole mask.
        first_row: where ``x`` is a slice of rows, the position of its first one, in the same way.

    Returns:
        ``[..., out_features]``
    """
    if seed is None or dropout == 0.0:
        seed, dropout = None, 0.0
    dtype = autocast_dtype(x)
    if dtype is None:
        return _apply(x, weight, bias, lora_A, lora_B, scaling, dropout, seed, columns, first_row)
    if x.dtype != torch.float64:  # autocast leaves float64 alone
        x = x.to(dtype)
        weight = None if weight is None else weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    with torch.autocast(x.device.type, enabled=False):
        return _apply(x, weight, bias, lora_A, lora_B, scaling, dropout, seed, columns, first_row)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return the dtype that autocast computes with where ``x`` lies, if it is on."""
    device_type = x.device.type
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def _apply(*arguments: Any) -> Tensor:
    y: Tensor = _LoRALinear.apply(*arguments)[0]  # type: ignore[no-untyped-call]  # untyped in torch
    return y


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
    return norms.clamp_min(torch.finfo(dtype).tiny)


def rescaled(y: Tensor, ratio: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``ratio * (y - b) + b`` in the dtype of ``y``, computed in ``ratio``'s: equal to ``y`` where it is 1.

    Args:
        y: ``[..., out_features]``, or any shape that the others broadcast against.
    """
    offset = torch.zeros_like(ratio) if bias is None else (1 - ratio) * bias
    return torch.addcmul(offset, y, ratio).to(y.dtype)


def dropped(seed: Tensor, num_rows: int, num_columns: int, dropout: float, device: torch.device) -> Tensor:
    """Return the dropout mask, True where an entry is dropped: ``[num_rows, num_columns]`` booleans.

    A hash of (seed, row, column) in integer tensor operations: the same on every call and every device, with nothing
    stored and no random state touched.

    Args:
        seed: scalar integer tensor; on another device than ``device`` it may only be a CPU one.
    """
    return _hashes(seed, num_rows, num_columns, device) < _threshold(dropout)


def keep_mask(
    seed: Tensor,
    like: Tensor,
    dropout: float,
    columns: tuple[int, int] | None = None,
    first_row: int = 0,
    *,
    num_columns: int | None = None,
) -> Tensor:
    """Return the complement of :func:`dropped` as zeros and ones of ``like``'s dtype, for its rows and device.

    CPU multiplies by them an order of magnitude faster than it makes and applies booleans.
    """
    size = like.shape[1] if num_columns is None else num_columns
    return _hashes(seed, like.shape[0], size, like.device, columns, first_row).ge_(_threshold(dropout)).to(like.dtype)


def keep_entries(x: Tensor, seed: Tensor, dropout: float) -> Tensor:
    """Return ``x`` with a share ``dropout`` of its entries set to zero and the others scaled up, by a hash of ``seed``.

    Args:
        x: ``[rows, ...]``, any number of dimensions.
    """
    rows = x.reshape(x.shape[0], -1) if x.ndim > 1 else x[None]
    kept = keep_mask(seed, rows, dropout)
    return (rows * kept / (1 - dropout)).view(x.shape)


def _threshold(dropout: float) -> int:
    """Return the signed 32-bit number that a share ``dropout`` of all such numbers lies below."""
    return round(dropout * 2**32) - 2**31


def _hashes(
    seed: Tensor,
    num_rows: int,
    num_columns: int,
    device: torch.device,
    columns: tuple[int, int] | None = None,
    first_row: int = 0,
) -> Tensor:
    """Return one hash per position: int32, ``[num_rows, num_columns]``."""
    first, total = columns or (0, num_columns)
    across, _, rows = _position_keys(seed, total + first_row + num_rows, device).split([total, first_row, num_rows])
    z: Tensor = rows[:, None] ^ across[None, first : first + num_columns]
    z = z.mul_(_MIX_1)
    z = z.bitwise_xor_(z >> 15)
    return z.mul_(_MIX_2)


def _position_keys(seed: Tensor, num_positions: int, device: torch.device) -> Tensor:
    """Return one well mixed 32-bit key per position: int32, ``[num_positions]``."""
    z = torch.arange(1, num_positions + 1, dtype=torch.int64, device=device)
    z = (z + seed * 0x2545F4914F6CDD1D) * _GOLDEN
    z = (z ^ (z >> 32)) * 0x3F58476D1CE4E5B9
    z = (z ^ (z >> 29)) * 0x14D049BB133111EB
    return (z >> 31).to(torch.int32)


class _LoRALinear(torch.autograd.Function):
    """``(y, h)``: the output and, for backward only, ``h = kept * x A^T``."""

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float,
        dropout: float,
        seed: Tensor | None,
        columns: tuple[int, int] | None,
        first_row: int,
    ) -> tuple[Tensor, Tensor]:
        rows = x.reshape(-1, x.shape[-1])  # [T, in]
        kept = None if seed is None else keep_mask(seed, rows, dropout, columns, first_row)
        h = down(rows, lora_A, kept)  # [T, r]
        y = sum_of_products(rows, weight, bias, h, lora_B, scaling / (1 - dropout))
        # not a view to autograd: the caller may change the output in place, as nn.ReLU(inplace=True) does
        return torch.ops.aten._unsafe_view.default(y, [*x.shape[:-1], lora_B.shape[0]]), h

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, weight, bias, lora_A, lora_B, ctx.scaling, ctx.dropout, seed, ctx.columns, ctx.first_row = inputs
        _, h = output
        ctx.mark_non_differentiable(h)
        ctx.set_materialize_grads(False)
        need_x, need_weight, _, need_A, need_B, *_ = ctx.needs_input_grad
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(
            x if need_weight or need_A or need_B else None,
            weight if need_x else None,
            lora_A,
            lora_B,
            h if need_B else None,
            seed,
        )
        ctx.x_shape = x.shape

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 10
        x, weight, lora_A, lora_B, h, seed = ctx.saved_tensors
        need_x, need_weight, need_bias, need_A, need_B, *_ = ctx.needs_input_grad
        grad = grad.reshape(-1, lora_B.shape[0])  # [T, out]
        rows: Any = None if x is None else x.reshape(-1, x.shape[-1])  # [T, in]
        factor = ctx.scaling / (1 - ctx.dropout)
        grad_x = grad_A = grad_B = grad_weight = grad_bias = kept = None
        if seed is not None:
            like = grad if rows is None else rows
            kept = keep_mask(seed, like, ctx.dropout, ctx.columns, ctx.first_row, num_columns=lora_A.shape[1])
        if need_x or need_A:
            v = skinny(grad, lora_B.to(grad.dtype).t())  # [T, r]
            if need_x:
                grad_x = grad_input(grad, weight, v, lora_A, factor, kept).view(ctx.x_shape)
            if need_A:
                grad_A = scaled_mm(v.t(), rows if kept is None else rows * kept, factor, lora_A.dtype)
        if need_B:
            if torch.is_grad_enabled():  # h is a constant to autograd: make it again for a second derivative
                h = down(rows, lora_A, kept)
            grad_B = grad_of_B(h, grad, factor, lora_B.dtype)
        if need_weight:
            grad_weight = torch.mm(grad.t(), rows)
        if need_bias:
            grad_bias = grad.sum(0).to(ctx.bias_dtype)
        return grad_x, grad_weight, grad_bias, grad_A, grad_B, None, None, None, None, None


# apply() binds its inputs to the signature of forward on every call; reading it from the code
# each time would take a third of a small layer's forward
_LoRALinear.forward.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
    [inspect.Parameter("inputs", inspect.Parameter.VAR_POSITIONAL)]
)


def down(rows: Tensor, lora_A: Tensor, kept: Tensor | None) -> Tensor:
    """Return ``kept * x A^T``, ``[T, r]``: no factor is on it, those go with the products that it enters."""
    return skinny(rows if kept is None else rows * kept, lora_A.to(rows.dtype))


def skinny(rows: Tensor, factor: Tensor) -> Tensor:
    """Return ``rows factor^T``, ``[T, r]``, with r on the side of the product where the device is fast.

    CPU libraries are several times faster with the short dimension first, and so the result is kept transposed there.
    """
    if rows.device.type == "cpu":
        return torch.mm(factor, rows.t()).t()
    return torch.mm(rows, factor.t())


def scaled_mm(left: Tensor, right: Tensor, factor: float, dtype: torch.dtype | None = None) -> Tensor:
    """Return ``factor * left right`` in one kernel, in ``dtype``; a device that can does not round in between."""
    if dtype in (None, left.dtype):
        return torch.addmm(left.new_empty(()), left, right, beta=0, alpha=factor)
    if dtype == torch.float32 and not torch.is_grad_enabled() and _accumulates_out(left.device, left.dtype):
        wide: Tensor = torch.mm(left, right, out_dtype=torch.float32)
        return wide.mul_(factor)
    return scaled_mm(left, right, factor).to(dtype)


@functools.cache
def _accumulates_out(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether products of a narrow dtype can be written in float32 on a device: CUDA, torch 2.8."""
    if device.type != "cuda":
        return False
    probe = torch.ones(16, 16, device=device, dtype=dtype)
    try:
        return bool(torch.mm(probe, probe, out_dtype=torch.float32).dtype == torch.float32)
    except (TypeError, RuntimeError):
        return False


def adapter_first(device: torch.device) -> bool:
    """Whether the adapter's product is written first and the base's is added to it, on a device.

    A GPU's large product reads what it is added to while it computes, so that only the writing is paid for (RunLoRA's
    order "forward 3", arXiv 2312.03415); on CPU the small product is added, and the base's is bit for bit its own.
    """
    return device.type == "cuda"


def sum_of_products(
    rows: Tensor, weight: Tensor | None, bias: Tensor | None, h: Tensor, lora_B: Tensor, factor: float
) -> Tensor:
    """Return ``x W^T + b + factor * h B^T``, ``[T, out]``, in a buffer that nobody else has seen."""
    B = lora_B.to(rows.dtype).t()
    if weight is None:
        return scaled_mm(h, B, factor)
    if adapter_first(rows.device):
        y = scaled_mm(h, B, factor) if bias is None else torch.addmm(bias, h, B, alpha=factor)
        return y.addmm_(rows, weight.t())
    return F.linear(rows, weight, bias).addmm_(h, B, alpha=factor)


def grad_input(
    grad: Tensor, weight: Tensor | None, v: Tensor, lora_A: Tensor, factor: float, kept: Tensor | None
) -> Tensor:
    """Return ``dy W + factor * kept * (v A)``, ``[T, in]``."""
    A = lora_A.to(grad.dtype)
    if weight is not None and kept is None and not adapter_first(grad.device):
        return torch.mm(grad, weight).addmm_(v, A, alpha=factor)
    through_adapter = scaled_mm(v, A, factor)
    if kept is not None:
        through_adapter.mul_(kept)
    return through_adapter if weight is None else through_adapter.addmm_(grad, weight)


def grad_of_B(h: Tensor, grad: Tensor, factor: float, dtype: torch.dtype) -> Tensor:
    """Return ``factor * dy^T h``, ``[out, r]``, with r on the fast side as in :func:`skinny`."""
    if grad.device.type == "cpu":
        return scaled_mm(h.t(), grad, factor, dtype).t()
    return scaled_mm(grad.t(), h, factor, dtype)
