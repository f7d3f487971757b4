"""Adapted linear layers on tensors: base and adapter are one autograd function. No modules, no process groups.

x [..., in] --+-- W_1 [out_1, in] frozen ------------------- + --> y_1 [..., out_1]
     \\        |                                             |
      dropout -- A_1 [r, in] -- h_1 [..., r] -- B_1 [out_1, r] * scaling
              |
              +-- W_2, A_2, B_2 --> y_2 ...

The function serves one layer, or several layers that read one input. All A's are then multiplied in one product, the
gradients of x are summed in one buffer, and one dropout mask serves all layers. It also serves layers whose rows have
several adapters: see :mod:`lightning_lora.ops.mixture`.
"""

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lora.compat.torch import is_transformed, unsafe_view
from lightning_lora.ops import products
from lightning_lora.ops.autocast import autocast_dtype
from lightning_lora.ops.linear_tensors import LinearTensors, ScaledDropout
from lightning_lora.ops.mixture import Shares, backward_of_mixture, forward_of_mixture, plain_mixture
from lightning_lora.ops.products import (
    Dense,
    grad_input,
    grad_of_B,
    inner_gradients,
    scaled_mm,
    skinny_mm,
    split_by_rank,
    stacked,
)
from lightning_lora.ops.stored import apart, dense_again, dense_like, dense_linear, together


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
    """Return ``x W^T + b + scaling * dropout(x) A^T B^T`` (Hu et al. 2021, sec. 4.1).

    Saved for backward are ``x`` and ``h = x A^T`` (r numbers per token), beside the parameters themselves. ``x`` is
    never cast up: A and B are cast to its dtype, and their gradients have the dtypes of A and B. Under autocast the
    product runs in autocast's dtype, as ``F.linear`` does.

    Args:
        x: ``[..., in_features]``, any number of leading dimensions, also none or empty ones.
        weight: ``[out_features, in_features]``, or ``None`` for the adapter's term alone.
        bias: ``[out_features]`` or ``None``.
        lora_A: ``[r, in_features]``.
        lora_B: ``[out_features, r]``.
        scaling: factor of the adapter's term.
        dropout: probability of dropping an entry of ``x`` on the adapter's path.
        seed: scalar integer tensor that decides which entries are dropped; ``None`` drops none. The mask is a hash of
            the seed and of each entry's position, so that backward recomputes it instead of storing it.
        columns: where ``x`` is a slice of features, the position of its first one and the number of all, so that the
            mask is that slice of the whole mask.
        first_row: where ``x`` is a slice of rows, the position of its first one, in the same way.

    Returns:
        ``[..., out_features]``
    """
    layer, settings = (
        LinearTensors(weight, bias, lora_A, lora_B),
        ScaledDropout(scaling, dropout, seed, columns, first_row),
    )
    return lora_linears(x, [layer], settings)[0]


def lora_linears(x: Tensor, layers: Sequence[LinearTensors], settings: ScaledDropout | Shares) -> Sequence[Tensor]:
    """Return ``x W_i^T + b_i + scaling * dropout(x) A_i^T B_i^T`` for every layer i, with one product for all A's.

    Saved for backward are ``x`` and the r numbers per token of each layer. A weight that is stored in another form is
    made dense in the dtype of the product, and again in backward if x needs a gradient.

    Args:
        x: ``[..., in_features]``.
        layers: of one ``in_features``; sizes of outputs and ranks may differ. With :class:`Shares` the base layers,
            followed by the factors of every share.

    Returns:
        One ``[..., out_features_i]`` per base layer.
    """
    dtype = autocast_dtype(x)
    if dtype is not None:
        with torch.autocast(x.device.type, enabled=False):
            return lora_linears(*cast_as_autocast(x, layers, dtype), settings)
    if is_transformed():
        return PLAIN[type(settings)](x, layers, settings)  # type: ignore[no-any-return]
    for layer in layers:
        if layer.is_stored:
            settings = settings._replace(has_stored=True)
    outputs: tuple[Tensor, ...] = _LoRALinears.apply(x, settings, *chain.from_iterable(layers))  # type: ignore[no-untyped-call]
    return outputs


def cast_as_autocast(
    x: Tensor, layers: Sequence[LinearTensors], dtype: torch.dtype
) -> tuple[Tensor, Sequence[LinearTensors]]:
    """Return the input and the base's tensors as autocast casts them for ``F.linear``: float64 stays.

    The adapters are cast where they are multiplied.
    """
    if x.dtype == torch.float64:
        return x, layers

    def cast(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(dtype)

    return x.to(dtype), [
        layer._replace(bias=cast(layer.bias))  # a stored weight is made dense in the dtype of x
        if layer.is_stored
        else layer._replace(weight=cast(layer.weight), bias=cast(layer.bias))
        for layer in layers
    ]


def plain_linears(x: Tensor, layers: Sequence[LinearTensors], settings: ScaledDropout) -> list[Tensor]:
    """Return :func:`lora_linears` without autocast by operations that torch can transform."""
    rows = x.reshape(-1, x.shape[-1])
    mask = None if settings.seed is None else settings.mask(rows, rows.shape[1])
    entering = x if mask is None else (rows * mask).view(x.shape)
    outputs = []
    for layer in layers:
        weight, bias, lora_A, lora_B = layer
        if layer.is_stored and weight is not None:
            weight, bias = dense_like(weight, x), None if bias is None else bias.to(x.dtype)
        h = F.linear(entering, lora_A.to(x.dtype)) * settings.factor
        y = F.linear(h, lora_B.to(x.dtype))
        outputs.append(y if weight is None else F.linear(x, weight, bias) + y)
    return outputs


class _LoRALinears(torch.autograd.Function):
    """``forward(x, settings, W_1, b_1, A_1, B_1, W_2, ...) -> (y_1, y_2, ...)``.

    ``forward`` takes ``ctx``: with a separate ``setup_context``, ``apply`` would bind the arguments to the signature of
    ``forward``, which takes longer than a small product.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, settings: ScaledDropout | Shares, *tensors: Any) -> tuple[Tensor, ...]:
        dense = dense_like if settings.has_stored else None
        outputs, h = FORWARD[type(settings)](x.reshape(-1, x.shape[-1]), tensors, settings, dense)
        need_x, _, *needs = ctx.needs_input_grad
        needs_h = any(needs[3::4])  # by the gradient of a B
        needs_rows = needs_h or any(needs[2::4]) or any(needs[::4])
        saved, nothing = list(tensors), [None] * (len(tensors) // 4)
        saved[1::4] = nothing  # biases
        ctx.stored = None
        if not need_x:
            saved[::4] = nothing  # weights
        elif settings.has_stored:
            ctx.stored, saved[::4] = apart(saved[::4])
        ctx.save_for_backward(x if needs_rows else None, h if needs_h else None, settings.seed, *saved)
        ctx.set_materialize_grads(False)
        ctx.settings, ctx.x_shape = settings, x.shape
        return tuple(outputs if x.ndim == 2 else [reshape_like(x, y) for y in outputs])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, h, seed, *tensors = ctx.saved_tensors
        need_x, _, *needs = ctx.needs_input_grad
        dense = None
        if ctx.stored is not None:
            tensors[::4], dense = together(ctx.stored, tensors[::4]), dense_again
        grad_x, found = BACKWARD[type(ctx.settings)](
            None if x is None else x.reshape(-1, x.shape[-1]),
            [None if grad is None else grad.reshape(-1, grad.shape[-1]) for grad in grads],
            tensors,
            h,
            ctx.settings if seed is None else ctx.settings._replace(seed=seed),
            needs,
            need_x=need_x,
            dense=dense,
        )
        return None if grad_x is None else grad_x.view(ctx.x_shape), None, *found


def reshape_like(x: Tensor, y: Tensor) -> Tensor:
    """Return ``y`` ``[T, out]`` in the leading shape of ``x``."""
    # not a view to autograd: the caller may change the output in place, as nn.ReLU(inplace=True) does
    return y if x.ndim == 2 else unsafe_view(y, [*x.shape[:-1], y.shape[-1]])


def forward_of_linears(
    rows: Tensor, tensors: Sequence[Any], settings: ScaledDropout, dense: Dense | None = None
) -> tuple[list[Tensor], Tensor]:
    """Return the outputs ``[T, out_i]`` and ``h = mask * x [A_1; ...; A_n]^T``, ``[T, sum of ranks]``.

    Args:
        rows: x as ``[T, in]``.
        tensors: the four :class:`LinearTensors` of each layer, all layers in a row.
        dense: makes each weight a tensor, one at a time; ``None`` where all of them are.
    """
    weights, biases, As, Bs = tensors[::4], tensors[1::4], tensors[2::4], tensors[3::4]
    factor, entering = settings.factor, rows
    if settings.seed is not None:
        entering = rows * settings.mask(rows, rows.shape[1])
    h = skinny_mm(entering, stacked(As).to(rows.dtype))
    outputs = []
    for weight, bias, B, part in zip(weights, biases, Bs, split_by_rank(h, 1, As), strict=True):
        B = B.to(rows.dtype).t()
        if dense is not None and weight is not None:
            weight, bias = dense(weight, rows), None if bias is None else bias.to(rows.dtype)
        if weight is None:
            y = scaled_mm(part, B, factor)
        elif rows.device.type in products.ADAPTER_FIRST:
            y = scaled_mm(part, B, factor) if bias is None else torch.addmm(bias, part, B, alpha=factor)
            y.addmm_(rows, weight.t())
        else:
            linear = F.linear if dense is None else dense_linear
            y = linear(rows, weight, bias).addmm_(part, B, alpha=factor)
        outputs.append(y)
    return outputs, h


def backward_of_linears(
    rows: Any,
    grads: Sequence[Tensor | None],
    tensors: Sequence[Any],
    h: Tensor | None,
    settings: ScaledDropout,
    needs: Sequence[bool],
    *,
    need_x: bool,
    dense: Dense | None = None,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Return the gradient of x, ``[T, in]``, and the gradients of each layer's four tensors, all layers in a row.

    Args:
        rows: ``[T, in]``; ``None`` may be given when only x needs a gradient.
        grads: ``[T, out_i]``; ``None`` for an output that does not reach the loss.
        tensors: those of :func:`forward_of_linears`.
        h: what :func:`forward_of_linears` returned; may be ``None`` when no B needs a gradient.
        needs: whether each of ``tensors`` needs a gradient.
        dense: as in :func:`forward_of_linears`.
    """
    found: list[Tensor | None] = [None] * len(tensors)
    used = [i for i, grad in enumerate(grads) if grad is not None]
    if not used:
        return None, found
    As, factor = tensors[2::4], settings.factor
    given: list[Any] = [grads[i] for i in used]
    reached = [As[i] for i in used]
    need_A, need_B = any(needs[2::4]), any(needs[3::4])
    mask = None if settings.seed is None else settings.mask(given[0] if rows is None else rows, As[0].shape[1])
    recomputes_h = need_B and torch.is_grad_enabled()  # for a second derivative: the saved h is a constant to autograd
    entering = rows * mask if mask is not None and (need_A or recomputes_h) else rows
    grad_x: Tensor | None = None
    grads_A: Sequence[Any] = used
    if need_x or need_A:
        v = inner_gradients(given, [tensors[4 * i + 3] for i in used])  # [T, sum of ranks]
        if need_x:
            weights = [tensors[4 * i] for i in used]
            grad_x = grad_input(given, weights, v, stacked(reached).to(v.dtype), factor, mask, dense)
        if need_A:
            grads_A = split_by_rank(scaled_mm(v.t(), entering, factor, As[0].dtype), 0, reached)
    if recomputes_h:
        h = skinny_mm(entering, stacked(As).to(entering.dtype))
    parts: Any = h if h is None else split_by_rank(h, 1, As)
    for i, grad, grad_A in zip(used, given, grads_A, strict=True):
        need_weight, need_bias, need_own_A, need_own_B = needs[4 * i : 4 * i + 4]
        found[4 * i : 4 * i + 4] = (
            torch.mm(grad.t(), rows) if need_weight else None,
            grad.sum(0) if need_bias else None,
            grad_A if need_own_A else None,
            grad_of_B(parts[i], grad, factor, tensors[4 * i + 3].dtype) if need_own_B else None,
        )
    return grad_x, found


# by what acts: one adapter, or a mixture
FORWARD: dict[type, Any] = {ScaledDropout: forward_of_linears, Shares: forward_of_mixture}
BACKWARD: dict[type, Any] = {ScaledDropout: backward_of_linears, Shares: backward_of_mixture}
PLAIN: dict[type, Any] = {ScaledDropout: plain_linears, Shares: plain_mixture}
