"""The tensor math of fused experts with adapters, as one autograd function.

x -- rows by expert --> gate_up_e --> e -- G --> h -- * w --> down_e -- sum over a token's rows --> y

x, e, the order of the rows and r numbers per row of each adapter are saved for backward; the rows and h are recomputed.
"""

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lora.ops.experts import grouped, loop, traced
from lightning_lora.ops.experts.gates import Gate
from lightning_lora.ops.experts.records import ExpertWeights, Groups
from lightning_lora.ops.gated_mlp import differentiable_gradients
from lightning_lora.ops.linear import lora_linear
from lightning_lora.ops.packed_stack import PackedStack
from lightning_lora.ops.stored import apart, together

Product = Callable[[Tensor, Groups, ExpertWeights], Tensor]


def lora_experts(
    x: Tensor,
    index: Tensor,
    weights: Tensor,
    gate_up: ExpertWeights,
    down: ExpertWeights,
    gate: Gate,
    *,
    dtype: torch.dtype,
) -> Tensor:
    """Return ``sum_k w_k down_e(G(gate_up_e(x)))`` with ``e`` the k-th expert of each token, in the dtype of ``x``.

    The weights are multiplied into what enters ``down``. The base's weights and biases get no gradient.

    Args:
        x: ``[T, hidden]``.
        index: ``[T, k]``, the experts of each token, each below their number.
        weights: ``[T, k]``.
        dtype: what the products run in.
    """
    if torch.compiler.is_compiling():
        groups = Groups.of(index, gate_up.weight.shape[0], on_host=False)
        with torch.autocast(x.device.type, enabled=False):
            return formula(x.to(dtype), weights, groups, gate_up, down, gate, traced.product).to(x.dtype)
    packed, (opening, closing) = apart([gate_up.weight, down.weight])
    sizes = *gate_up.weight.shape[1:], *down.weight.shape[1:]
    on_device = packed == [None, None] and grouped.takes(x[:0].to(dtype), *sizes)
    groups = Groups.of(index, gate_up.weight.shape[0], on_host=not on_device)
    fixed = _Fixed(gate, (gate_up.scaling, down.scaling), tuple(packed))
    tensors = opening, *gate_up[1:4], closing, *down[1:4]
    with torch.autocast(x.device.type, enabled=False):
        y: Tensor = _Experts.apply(x.to(dtype), weights, groups, fixed, *tensors)  # type: ignore[no-untyped-call]
    return y.to(x.dtype)


def _products(groups: Groups) -> ModuleType:
    return grouped if groups.counts is None else loop


class _Fixed(NamedTuple):
    """What is neither a tensor nor differentiated; ``packed`` holds the weights that are no tensors, else ``None``."""

    gate: Gate
    scalings: tuple[float, float]
    packed: tuple[PackedStack | None, ...]


class _Experts(torch.autograd.Function):
    """``forward(x, weights, groups, fixed, tensors of gate_up, tensors of down) -> y``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, groups: Groups, fixed: _Fixed, *tensors: Any) -> Tensor:
        gate_up, down = _both(tensors, fixed)
        products = _products(groups)
        e, u_in = products.forward(products.dispatch(x, groups), groups, gate_up)
        if gate_up.bias is not None:
            e.add_(gate_up.bias.index_select(0, groups.experts()))
        w = weights.reshape(-1, 1).index_select(0, groups.order)
        y, u_out = products.forward(fixed.gate.forward(e).mul_(w), groups, down)
        if down.bias is not None:
            y.add_(down.bias.index_select(0, groups.experts()) * w)
        ctx.fixed, ctx.counts = fixed, groups.counts
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weights, *groups[:3], e, u_in, u_out, *tensors)
        return groups.combine(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        x, weights, order, places, ends, e, u_in, u_out, *tensors = ctx.saved_tensors
        groups = Groups(order, places, ends, ctx.counts)
        if torch.is_grad_enabled():
            y = formula(x, weights, groups, *_both(tensors, ctx.fixed), ctx.fixed.gate, _one_by_one)
            return differentiable_gradients(ctx, y, [x, weights, None, None, *tensors], grad)
        gate_up, down = _both(tensors, ctx.fixed)
        products = _products(groups)
        need_x, need_w, _, _, *needs = ctx.needs_input_grad
        w = weights.reshape(-1, 1).index_select(0, order)
        h, back = ctx.fixed.gate.recompute(e)
        dy = products.dispatch(grad, groups)
        to_down = products.backward(dy, h, u_out, groups, down, (True, *needs[6:8]), w)
        dh = to_down.rows
        grad_w = None
        if need_w:
            wide = torch.promote_types(w.dtype, torch.float32)
            by_row = h.mul_(dh).sum(1, dtype=wide)
            if down.bias is not None:
                by_row += (groups.dispatch(grad) * down.bias.index_select(0, groups.experts())).sum(1, dtype=wide)
            grad_w = by_row[places].to(w.dtype)
        del h, dy
        to_up = products.backward(
            back(dh.mul_(w)), products.dispatch(x, groups), u_in, groups, gate_up, (need_x, *needs[2:4]), None
        )
        grad_x = groups.combine(to_up.rows) if need_x else None
        found = None, None, to_up.lora_A, to_up.lora_B, None, None, to_down.lora_A, to_down.lora_B
        return grad_x, grad_w, None, None, *found


def _both(tensors: Sequence[Any], fixed: _Fixed) -> tuple[ExpertWeights, ExpertWeights]:
    opening, closing = together(fixed.packed, tensors[::4])
    first, second = fixed.scalings
    return ExpertWeights._make((opening, *tensors[1:4], first)), ExpertWeights._make((closing, *tensors[5:], second))


def formula(
    x: Tensor,
    weights: Tensor,
    groups: Groups,
    gate_up: ExpertWeights,
    down: ExpertWeights,
    gate: Gate,
    product: Product,
) -> Tensor:
    """Return :func:`lora_experts` by operations that autograd, or a tracer, looks into, for one kind of products."""
    h = gate.plain(product(groups.dispatch(x), groups, gate_up))
    w = weights.reshape(-1, 1).index_select(0, groups.order)
    y = product((h * w).to(h.dtype), groups, down._replace(bias=None))
    if down.bias is not None:
        y = y + (down.bias[groups.experts()] * w).to(y.dtype)
    return y[groups.places].sum(1)


def _one_by_one(rows: Tensor, groups: Groups, layer: ExpertWeights) -> Tensor:
    """Return what each expert's linear layer gives for its rows, by operations that have second derivatives."""
    bias, weight = None if layer.bias is None else layer.bias.to(rows.dtype), cast(Any, layer.weight)
    A, B, last = layer.lora_A, layer.lora_B, groups.ends.tolist()
    if isinstance(weight, Tensor):
        weight = weight.to(rows.dtype)
    elif A is not None and B is not None:
        weight, A, B = weight.with_update(B, A, layer.scaling), None, None
    parts = []
    for expert, (start, end) in enumerate(zip([0, *last], last, strict=False)):
        x, W, b = rows[start:end], weight[expert], None if bias is None else bias[expert]
        if A is None or B is None:
            parts.append(F.linear(x, W, b))
        else:
            parts.append(lora_linear(x, W, b, A[expert], B[expert], scaling=layer.scaling))
    return torch.cat(parts)
