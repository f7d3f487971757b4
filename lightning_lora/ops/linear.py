"""Adapted linear layers on tensors: base and adapter are one autograd function. No modules, no process groups.

x [..., in] --+-- W_1 [out_1, in] frozen ------------------- + --> y_1 [..., out_1]
     \\        |                                             |
      dropout -- A_1 [r, in] -- h_1 [..., r] -- B_1 [out_1, r] * scaling
              |
              +-- W_2, A_2, B_2 --> y_2 ...

The function serves one layer, or several layers that read one input. All A's are then multiplied in one product, the
gradients of x are summed in one buffer, and one dropout mask serves all layers.

Each product of rank r is computed in the layout and the order that are fast on its device. No function changes a tensor
that it is given.
"""

import functools
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lora.compat.torch import is_transformed, unsafe_view
from lightning_lora.ops.autocast import autocast_dtype
from lightning_lora.ops.dropout import keep_mask
from lightning_lora.ops.stored import apart, dense_again, dense_like, dense_linear, runs_in_onednn, together


class _LinearTensors(NamedTuple):
    weight: Any  # Tensor | StoredWeight | None, [out, in]
    bias: Any  # Tensor | None, [out]
    lora_A: Any  # Tensor, [r, in]
    lora_B: Any  # Tensor, [out, r]


class LinearTensors(_LinearTensors):
    """The tensors of one adapted linear layer; ``weight`` is ``None`` for the adapter's term alone."""

    __slots__ = ()
    is_stored: ClassVar[bool] = False


class StoredLinearTensors(LinearTensors):
    """The same with a :class:`~lightning_lora.ops.stored.StoredWeight`, or with ``None``."""

    __slots__ = ()
    is_stored: ClassVar[bool] = True


class ScaledDropout(NamedTuple):
    """Scaling and dropout shared by all adapters that read one input: the arguments of :func:`lora_linear`."""

    scaling: float
    dropout: float = 0.0
    seed: Tensor | None = None
    columns: tuple[int, int] | None = None
    first_row: int = 0
    has_stored: bool = False  # whether a weight is a StoredWeight: said by the functions that take the layers

    @property
    def factor(self) -> float:
        """What a product with the kept entries is multiplied by."""
        return self.scaling if self.seed is None else self.scaling / (1 - self.dropout)

    def mask(self, like: Tensor, num_columns: int) -> Tensor:
        """Return zeros where an entry is dropped and ones elsewhere, ``[T, num_columns]``; only with a seed."""
        assert self.seed is not None
        return keep_mask(self.seed, like, self.dropout, self.columns, self.first_row, num_columns=num_columns)


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


def lora_linears(x: Tensor, layers: Sequence[LinearTensors], settings: ScaledDropout) -> Sequence[Tensor]:
    """Return ``x W_i^T + b_i + scaling * dropout(x) A_i^T B_i^T`` for every layer i, with one product for all A's.

    Saved for backward are ``x`` and the r numbers per token of each layer. A weight that is stored in another form is
    made dense in the dtype of the product, and again in backward if x needs a gradient.

    Args:
        x: ``[..., in_features]``.
        layers: of one ``in_features``; sizes of outputs and ranks may differ.

    Returns:
        One ``[..., out_features_i]`` per layer.
    """
    dtype = autocast_dtype(x)
    if dtype is not None:
        with torch.autocast(x.device.type, enabled=False):
            return lora_linears(*cast_as_autocast(x, layers, dtype), settings)
    if is_transformed():
        return plain_linears(x, layers, settings)
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
    def forward(ctx: Any, x: Tensor, settings: ScaledDropout, *tensors: Any) -> tuple[Tensor, ...]:
        dense = dense_like if settings.has_stored else None
        outputs, h = forward_of_linears(x.reshape(-1, x.shape[-1]), tensors, settings, dense)
        need_x, _, *needs = ctx.needs_input_grad
        needs_h = any(needs[3::4])  # by the gradient of a B
        needs_rows = needs_h or any(needs[2::4]) or any(needs[::4])
        saved, nothing = list(tensors), [None] * len(outputs)
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
        grad_x, found = backward_of_linears(
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


Dense = Callable[[Any, Tensor], Tensor]


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
    h = skinny_mm(entering, _stacked(As).to(rows.dtype))
    outputs = []
    for weight, bias, B, part in zip(weights, biases, Bs, _split_by_rank(h, 1, As), strict=True):
        B = B.to(rows.dtype).t()
        if dense is not None and weight is not None:
            weight, bias = dense(weight, rows), None if bias is None else bias.to(rows.dtype)
        if weight is None:
            y = scaled_mm(part, B, factor)
        elif rows.device.type in ADAPTER_FIRST:
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
        v = _inner_gradients(given, [tensors[4 * i + 3] for i in used])  # [T, sum of ranks]
        if need_x:
            weights = [tensors[4 * i] for i in used]
            grad_x = _grad_input(given, weights, v, _stacked(reached).to(v.dtype), factor, mask, dense)
        if need_A:
            grads_A = _split_by_rank(scaled_mm(v.t(), entering, factor, As[0].dtype), 0, reached)
    if recomputes_h:
        h = skinny_mm(entering, _stacked(As).to(entering.dtype))
    parts: Any = h if h is None else _split_by_rank(h, 1, As)
    for i, grad, grad_A in zip(used, given, grads_A, strict=True):
        need_weight, need_bias, need_own_A, need_own_B = needs[4 * i : 4 * i + 4]
        found[4 * i : 4 * i + 4] = (
            torch.mm(grad.t(), rows) if need_weight else None,
            grad.sum(0) if need_bias else None,
            grad_A if need_own_A else None,
            _grad_of_B(parts[i], grad, factor, tensors[4 * i + 3].dtype) if need_own_B else None,
        )
    return grad_x, found


def _stacked(As: Sequence[Tensor]) -> Tensor:
    """Return the A's one below the other: ``[sum of ranks, in]``."""
    return As[0] if len(As) == 1 else torch.cat(list(As))


def _split_by_rank(stacked: Tensor, dim: int, As: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return each layer's part of what is made of all A's."""
    return [stacked] if len(As) == 1 else stacked.split([A.shape[0] for A in As], dim)


def skinny_mm(rows: Tensor, factor: Tensor) -> Tensor:
    """Return ``rows factor^T``, ``[T, r]``, with r on the side of the product where the device is fast.

    CPU libraries are several times faster with the short dimension first, so the result is a transposed view there.
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
    """Return True if products of a narrow dtype can be written in float32 on a device: CUDA, torch 2.8."""
    if device.type != "cuda":
        return False
    probe = torch.ones(16, 16, device=device, dtype=dtype)
    try:
        return bool(torch.mm(probe, probe, out_dtype=torch.float32).dtype == torch.float32)
    except (TypeError, RuntimeError):
        return False


# Device types on which the adapter's product is written first, and the base's is added to it. A GPU's large product
# reads what it is added to while it computes, so that only the writing is paid for (RunLoRA's order "forward 3", arXiv
# 2312.03415). On CPU the small product is added, and the base's is bit for bit its own.
ADAPTER_FIRST = {"cuda"}


def _grad_input(
    grads: Sequence[Tensor],
    weights: Sequence[Any],
    v: Tensor,
    A: Tensor,
    factor: float,
    mask: Tensor | None,
    dense: Dense | None,
) -> Tensor:
    """Return ``sum_i dy_i W_i + factor * mask * (v A)``, ``[T, in]``, accumulated in one buffer.

    Args:
        v: ``[T, sum of ranks]``, the gradient of h without the factor.
        A: ``[sum of ranks, in]``.
    """
    products = [(grad, weight) for grad, weight in zip(grads, weights, strict=True) if weight is not None]
    adds_adapter_last = products and mask is None and v.device.type not in ADAPTER_FIRST
    if adds_adapter_last:
        grad, weight = products.pop(0)
        total = torch.mm(grad, weight) if dense is None else dense_linear(grad, dense(weight, grad).t())
    else:
        total = scaled_mm(v, A, factor)
        if mask is not None:
            total.mul_(mask)
    for grad, weight in products:
        if dense is None:
            total.addmm_(grad, weight)
        elif runs_in_onednn(grad):
            total.add_(dense_linear(grad, dense(weight, grad).t()))
        else:
            total.addmm_(grad, dense(weight, grad))
    return total.addmm_(v, A, alpha=factor) if adds_adapter_last else total


def _grad_of_B(h: Tensor, grad: Tensor, factor: float, dtype: torch.dtype) -> Tensor:
    """Return ``factor * dy^T h``, ``[out, r]``, with r on the fast side as in :func:`skinny_mm`."""
    if grad.device.type == "cpu":
        return scaled_mm(h.t(), grad, factor, dtype).t()
    return scaled_mm(grad.t(), h, factor, dtype)


def _inner_gradients(grads: Sequence[Tensor], factors: Sequence[Tensor]) -> Tensor:
    """Return ``[dy_1 B_1, ..., dy_n B_n]``, ``[T, sum of ranks]``, in the layout of :func:`skinny_mm`.

    Args:
        grads: ``[T, out_i]``.
        factors: B's, ``[out_i, r_i]``.
    """
    first, factors = grads[0], [B.to(grads[0].dtype) for B in factors]
    if len(grads) == 1:
        return skinny_mm(first, factors[0].t())
    if torch.is_grad_enabled() or torch.compiler.is_compiling():  # neither takes out= of a part of a tensor
        return torch.cat([skinny_mm(grad, B.t()) for grad, B in zip(grads, factors, strict=True)], dim=1)
    ranks = [B.shape[1] for B in factors]
    on_cpu = first.device.type == "cpu"
    v = first.new_empty(sum(ranks), first.shape[0]).t() if on_cpu else first.new_empty(first.shape[0], sum(ranks))
    for grad, B, part in zip(grads, factors, v.split(ranks, dim=1), strict=True):
        torch.mm(grad, B, out=part)
    return v
