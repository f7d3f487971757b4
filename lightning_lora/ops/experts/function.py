"""The tensor math of fused experts with adapters, as one autograd function.

x -- rows by expert --> gate_up_e --> e -- G --> h -- * w --> down_e -- sum over a token's rows --> y

x, e, the order of the rows and r numbers per row of each adapter are saved for backward; the rows and h are recomputed.
"""

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lora.ops.experts import grouped, loop, traced
from lightning_lora.ops.experts.gates import Gate
from lightning_lora.ops.experts.records import ExpertWeights, Groups
from lightning_lora.ops.gated_mlp import differentiable_gradients
from lightning_lora.ops.linear import lora_linear

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
        groups = Groups.of(index, len(gate_up.weight), on_host=False)
        with torch.autocast(x.device.type, enabled=False):
            return formula(x.to(dtype), weights, groups, gate_up, down, gate, traced.product).to(x.dtype)
    on_device = grouped.takes(x[:0].to(dtype), *gate_up.weight.shape[1:], *down.weight.shape[1:])
    groups = Groups.of(index, len(gate_up.weight), on_host=not on_device)
    scalings = gate_up.scaling, down.scaling
    with torch.autocast(x.device.type, enabled=False):
        y: Tensor = _Experts.apply(x.to(dtype), weights, groups, gate, scalings, *gate_up[:4], *down[:4])  # type: ignore[no-untyped-call]
    return y.to(x.dtype)


def _products(groups: Groups) -> ModuleType:
    return grouped if groups.counts is None else loop


class _Experts(torch.autograd.Function):
    """``forward(x, weights, groups, gate, scalings, tensors of gate_up, tensors of down) -> y``."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weights: Tensor, groups: Groups, gate: Gate, scalings: tuple[float, float], *tensors: Any
    ) -> Tensor:
        gate_up, down = _both(tensors, scalings)
        products = _products(groups)
        e, u_in = products.forward(products.dispatch(x, groups), groups, gate_up)
        if gate_up.bias is not None:
            e.add_(gate_up.bias.index_select(0, groups.experts()))
        w = weights.reshape(-1, 1).index_select(0, groups.order)
        y, u_out = products.forward(gate.forward(e).mul_(w), groups, down)
        if down.bias is not None:
            y.add_(down.bias.index_select(0, groups.experts()) * w)
        ctx.gate, ctx.scalings, ctx.counts = gate, scalings, groups.counts
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
            y = formula(x, weights, groups, *_both(tensors, ctx.scalings), ctx.gate, _one_by_one)
            return differentiable_gradients(ctx, y, [x, weights, None, None, None, *tensors], grad)
        gate_up, down = _both(tensors, ctx.scalings)
        products = _products(groups)
        need_x, need_w, _, _, _, *needs = ctx.needs_input_grad
        w = weights.reshape(-1, 1).index_select(0, order)
        h, back = ctx.gate.recompute(e)
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
        return grad_x, grad_w, None, None, None, *found


def _both(tensors: Sequence[Any], scalings: tuple[float, float]) -> tuple[ExpertWeights, ExpertWeights]:
    return ExpertWeights._make((*tensors[:4], scalings[0])), ExpertWeights._make((*tensors[4:], scalings[1]))


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
    weight, bias = layer.weight.to(rows.dtype), None if layer.bias is None else layer.bias.to(rows.dtype)
    parts, last = [], groups.ends.tolist()
    for expert, (start, end) in enumerate(zip([0, *last], last, strict=False)):
        x, W, b = rows[start:end], weight[expert], None if bias is None else bias[expert]
        if layer.lora_A is None or layer.lora_B is None:
            parts.append(F.linear(x, W, b))
        else:
            parts.append(lora_linear(x, W, b, layer.lora_A[expert], layer.lora_B[expert], scaling=layer.scaling))
    return torch.cat(parts)
