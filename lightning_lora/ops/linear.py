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
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lora.compat.torch import has_transforms, is_forward_mode, unsafe_view
from lightning_lora.ops.dropout import keep_mask

T = TypeVar("T")


class LinearTensors(NamedTuple):
    """The tensors of one adapted linear layer; ``weight`` is ``None`` for the adapter's term alone."""

    weight: Any  # Tensor | None, [out, in]
    bias: Any  # Tensor | None, [out]
    lora_A: Any  # Tensor, [r, in]
    lora_B: Any  # Tensor, [out, r]


class ScaledDropout(NamedTuple):
    """Scaling and dropout shared by all adapters that read one input: the arguments of :func:`lora_linear`."""

    scaling: float
    dropout: float = 0.0
    seed: Tensor | None = None
    columns: tuple[int, int] | None = None
    first_row: int = 0

    @property
    def factor(self) -> float:
        """What a product with the kept entries is multiplied by."""
        return self.scaling if self.seed is None else self.scaling / (1 - self.dropout)

    def mask(self, like: Tensor, num_columns: int) -> Tensor | None:
        """Return zeros where an entry is dropped and ones elsewhere, ``[T, num_columns]``; ``None`` drops nothing."""
        if self.seed is None or not self.dropout:
            return None
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
    settings = ScaledDropout(scaling, dropout, seed, columns, first_row)
    return in_autocast_dtype(_linears, x, [LinearTensors(weight, bias, lora_A, lora_B)], settings)[0]


def lora_linears(x: Tensor, layers: Sequence[LinearTensors], settings: ScaledDropout) -> Sequence[Tensor]:
    """Return ``x W_i^T + b_i + scaling * dropout(x) A_i^T B_i^T`` for every layer i, with one product for all A's.

    Saved for backward are ``x`` and the r numbers per token of each layer.

    Args:
        x: ``[..., in_features]``.
        layers: of one ``in_features``; sizes of outputs and ranks may differ.

    Returns:
        One ``[..., out_features_i]`` per layer.
    """
    return in_autocast_dtype(_linears, x, layers, settings)


def in_autocast_dtype(compute: Callable[..., T], x: Tensor, layers: Sequence[LinearTensors], *settings: Any) -> T:
    """Return ``compute(x, layers, *settings)``; under autocast with autocast off and in the dtype that it casts to.

    Autocast casts the base's tensors as for ``F.linear``; the adapters are cast where they are multiplied.
    """
    dtype = autocast_dtype(x)
    if dtype is None:
        return compute(x, layers, *settings)
    if x.dtype != torch.float64:  # autocast leaves float64 alone
        x, layers = x.to(dtype), [_base_in(dtype, layer) for layer in layers]
    with torch.autocast(x.device.type, enabled=False):
        return compute(x, layers, *settings)


def _base_in(dtype: torch.dtype, layer: LinearTensors) -> LinearTensors:
    weight, bias = (None if tensor is None else tensor.to(dtype) for tensor in layer[:2])
    return layer._replace(weight=weight, bias=bias)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return the dtype that autocast computes with on the device of ``x``; ``None`` while autocast is off."""
    device_type = x.device.type
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def is_transformed() -> bool:
    """Return True where torch transforms what runs (``torch.func``, forward-mode AD) or ``torch.jit.trace`` records it.

    Layers are then computed by torch's own operations: those can be transformed, an autograd function cannot.
    """
    if torch.compiler.is_compiling():
        return bool(_has_transforms())
    return has_transforms() or torch.jit.is_tracing() or is_forward_mode()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _has_transforms() -> bool:
    """Return the same where code is compiled: in a graph, transforms are fixed."""
    return has_transforms()


def _linears(x: Tensor, layers: Sequence[LinearTensors], settings: ScaledDropout) -> Sequence[Tensor]:
    """Return :func:`lora_linears` of tensors that have the dtype to compute in."""
    if is_transformed():
        return plain_linears(x, layers, settings)
    outputs: tuple[Tensor, ...] = _LoRALinears.apply(x, settings, *chain.from_iterable(layers))  # type: ignore[no-untyped-call]
    return outputs


def plain_linears(x: Tensor, layers: Sequence[LinearTensors], settings: ScaledDropout) -> list[Tensor]:
    """Return :func:`lora_linears` without autocast by operations that torch can transform."""
    rows = x.reshape(-1, x.shape[-1])
    mask = settings.mask(rows, rows.shape[1])
    entering = x if mask is None else (rows * mask).view(x.shape)
    outputs = []
    for weight, bias, lora_A, lora_B in layers:
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
        layers = by_layer(tensors)
        outputs, h = forward_of_linears(x.reshape(-1, x.shape[-1]), layers, settings)
        need_x, _, *needs = ctx.needs_input_grad
        needs_h = any(needs[3::4])  # by the gradient of a B
        needs_rows = needs_h or any(needs[2::4]) or any(needs[::4])
        saved, nothing = list(tensors), [None] * len(layers)
        saved[1::4] = nothing  # biases
        if not need_x:
            saved[::4] = nothing  # weights
        ctx.save_for_backward(x if needs_rows else None, h if needs_h else None, settings.seed, *saved)
        ctx.set_materialize_grads(False)
        ctx.settings, ctx.x_shape = settings, x.shape
        return tuple([reshape_like(x, y) for y in outputs])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, h, seed, *tensors = ctx.saved_tensors
        need_x, _, *needs = ctx.needs_input_grad
        grad_x, found = backward_of_linears(
            None if x is None else x.reshape(-1, x.shape[-1]),
            [None if grad is None else grad.reshape(-1, grad.shape[-1]) for grad in grads],
            by_layer(tensors),
            h,
            ctx.settings._replace(seed=seed),
            by_layer(needs),
            need_x=need_x,
        )
        return None if grad_x is None else grad_x.view(ctx.x_shape), None, *found


def differentiable_gradients(ctx: Any, y: Tensor, inputs: Sequence[Any], grad: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients of an autograd function's inputs with a graph of their own, for a second derivative.

    Args:
        y: the function's output, recomputed from ``inputs`` by operations that are differentiable twice.
        inputs: those of the function; ``None`` for those that never need a gradient.
    """
    wanted = [one for one, needed in zip(inputs, ctx.needs_input_grad, strict=True) if needed]
    found = iter(torch.autograd.grad(y, wanted, grad, create_graph=True, allow_unused=True))
    return tuple(next(found) if needed else None for needed in ctx.needs_input_grad)


def by_layer(flat: Sequence[Any]) -> list[LinearTensors]:
    """Return the tensors of each layer, or what else belongs to them one for one, of all layers in a row."""
    return [LinearTensors(*flat[i : i + 4]) for i in range(0, len(flat), 4)]


def reshape_like(x: Tensor, y: Tensor) -> Tensor:
    """Return ``y`` ``[T, out]`` in the leading shape of ``x``."""
    # not a view to autograd: the caller may change the output in place, as nn.ReLU(inplace=True) does
    return y if x.ndim == 2 else unsafe_view(y, [*x.shape[:-1], y.shape[-1]])


def forward_of_linears(
    rows: Tensor, layers: Sequence[LinearTensors], settings: ScaledDropout
) -> tuple[list[Tensor], Tensor]:
    """Return the outputs ``[T, out_i]`` and ``h = mask * x [A_1; ...; A_n]^T``, ``[T, sum of ranks]``."""
    mask = settings.mask(rows, rows.shape[1])
    h = skinny_mm(rows if mask is None else rows * mask, _stacked_A(layers, rows.dtype))
    outputs = [
        _sum_of_products(rows, layer, part, settings.factor)
        for layer, part in zip(layers, _split_by_rank(h, 1, layers), strict=True)
    ]
    return outputs, h


def backward_of_linears(
    rows: Any,
    grads: Sequence[Tensor | None],
    layers: Sequence[LinearTensors],
    h: Tensor | None,
    settings: ScaledDropout,
    needs: Sequence[LinearTensors],
    *,
    need_x: bool,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Return the gradient of x, ``[T, in]``, and the gradients of each layer's four tensors, all layers in a row.

    Args:
        rows: ``[T, in]``; ``None`` may be given when only x needs a gradient.
        grads: ``[T, out_i]``; ``None`` for an output that does not reach the loss.
        h: what :func:`forward_of_linears` returned; may be ``None`` when no B needs a gradient.
        needs: whether each tensor needs a gradient.
    """
    found: list[Tensor | None] = [None] * (4 * len(layers))
    used = [i for i, grad in enumerate(grads) if grad is not None]
    if not used:
        return None, found
    given, reached, factor = [grad for grad in grads if grad is not None], [layers[i] for i in used], settings.factor
    mask = settings.mask(given[0] if rows is None else rows, layers[0].lora_A.shape[1])
    need_A, need_B = any(needs[i].lora_A for i in used), any(needs[i].lora_B for i in used)
    recomputes_h = need_B and torch.is_grad_enabled()  # for a second derivative: the saved h is a constant to autograd
    entering = rows * mask if mask is not None and (need_A or recomputes_h) else rows
    grad_x: Tensor | None = None
    grads_A: Sequence[Any] = used
    if need_x or need_A:
        v = _inner_gradients(given, [layer.lora_B for layer in reached])  # [T, sum of ranks]
        if need_x:
            grad_x = _grad_input(given, reached, v, factor, mask)
        if need_A:
            grads_A = _split_by_rank(scaled_mm(v.t(), entering, factor, reached[0].lora_A.dtype), 0, reached)
    if recomputes_h:
        h = skinny_mm(entering, _stacked_A(layers, entering.dtype))
    parts: Any = h if h is None else _split_by_rank(h, 1, layers)
    for i, grad, grad_A in zip(used, given, grads_A, strict=True):
        found[4 * i : 4 * i + 4] = (
            torch.mm(grad.t(), rows) if needs[i].weight else None,
            grad.sum(0) if needs[i].bias else None,
            grad_A if needs[i].lora_A else None,
            _grad_of_B(parts[i], grad, factor, layers[i].lora_B.dtype) if needs[i].lora_B else None,
        )
    return grad_x, found


def _split_by_rank(stacked: Tensor, dim: int, layers: Sequence[LinearTensors]) -> Sequence[Tensor]:
    """Return each layer's part of what is made of all A's."""
    return [stacked] if len(layers) == 1 else stacked.split([layer.lora_A.shape[0] for layer in layers], dim)


def _stacked_A(layers: Sequence[LinearTensors], dtype: torch.dtype) -> Tensor:
    """Return the A's one below the other: ``[sum of ranks, in]``."""
    stacked: Tensor = layers[0].lora_A if len(layers) == 1 else torch.cat([layer.lora_A for layer in layers])
    return stacked.to(dtype)


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


def adapter_first(device: torch.device) -> bool:
    """Return True on a device where the adapter's product is written first and the base's is added to it.

    A GPU's large product reads what it is added to while it computes, so that only the writing is paid for (RunLoRA's
    order "forward 3", arXiv 2312.03415); on CPU the small product is added, and the base's is bit for bit its own.
    """
    return device.type == "cuda"


def _sum_of_products(rows: Tensor, layer: LinearTensors, h: Tensor, factor: float) -> Tensor:
    """Return ``x W^T + b + factor * h B^T``, ``[T, out]``, in a new buffer."""
    B = layer.lora_B.to(rows.dtype).t()
    if layer.weight is None:
        return scaled_mm(h, B, factor)
    if adapter_first(rows.device):
        y = scaled_mm(h, B, factor) if layer.bias is None else torch.addmm(layer.bias, h, B, alpha=factor)
        return y.addmm_(rows, layer.weight.t())
    return F.linear(rows, layer.weight, layer.bias).addmm_(h, B, alpha=factor)


def _grad_input(
    grads: Sequence[Tensor], layers: Sequence[LinearTensors], v: Tensor, factor: float, mask: Tensor | None
) -> Tensor:
    """Return ``sum_i dy_i W_i + factor * mask * (v A)``, ``[T, in]``, accumulated in one buffer.

    Args:
        v: ``[T, sum of ranks]``, the gradient of h without the factor.
    """
    A = _stacked_A(layers, v.dtype)
    products = [(grad, layer.weight) for grad, layer in zip(grads, layers, strict=True) if layer.weight is not None]
    adds_adapter_last = products and mask is None and not adapter_first(v.device)
    if adds_adapter_last:
        total = torch.mm(*products.pop(0))
    else:
        total = scaled_mm(v, A, factor)
        if mask is not None:
            total.mul_(mask)
    for grad, weight in products:
        total.addmm_(grad, weight)
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
    factors = [B.to(grad.dtype) for grad, B in zip(grads, factors, strict=True)]
    if len(grads) == 1:
        return skinny_mm(grads[0], factors[0].t())
    if torch.is_grad_enabled():
        return torch.cat([skinny_mm(grad, B.t()) for grad, B in zip(grads, factors, strict=True)], dim=1)
    first, ranks = grads[0], [B.shape[1] for B in factors]
    if first.device.type == "cpu":
        flat = first.new_empty(sum(ranks), first.shape[0])
        for grad, B, part in zip(grads, factors, flat.split(ranks), strict=True):
            torch.mm(B.t(), grad.t(), out=part)
        return flat.t()
    flat = first.new_empty(first.shape[0], sum(ranks))
    for grad, B, part in zip(grads, factors, flat.split(ranks, dim=1), strict=True):
        torch.mm(grad, B, out=part)
    return flat
