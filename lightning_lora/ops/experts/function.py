"""The tensor math of fused experts with adapters, as one autograd function.

x -- rows by expert --> gate_up_e --> e -- G --> h -- * w --> down_e -- sum over a token's rows --> y

x, e, the order of the rows and r numbers per row of each adapter are kept for backward; the rows and h are made again.
"""

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lora.ops.experts import grouped, loop, traced
from lightning_lora.ops.experts.gates import Gate
from lightning_lora.ops.experts.groups import Groups
from lightning_lora.ops.experts.stacks import Stack
from lightning_lora.ops.linear import lora_linear, run

Product = Callable[[Tensor, Groups, Stack], Tensor]


def lora_experts(
    x: Tensor, index: Tensor, weights: Tensor, gate_up: Stack, down: Stack, gate: Gate, *, dtype: torch.dtype
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
    flat = [tensor for stack in (gate_up, down) for tensor in stack[:4]]
    settings = (gate, gate_up.scaling, down.scaling, groups.counts)
    with torch.autocast(x.device.type, enabled=False):
        y, *_ = run(_Experts, x.to(dtype), weights, groups.order, groups.places, groups.ends, settings, *flat)
    return y.to(x.dtype)


def _stacks(settings: tuple[Any, ...], flat: Sequence[Any]) -> tuple[Stack, Stack]:
    return Stack._make((*flat[:4], settings[1])), Stack._make((*flat[4:], settings[2]))


def _products(groups: Groups) -> ModuleType:
    return grouped if groups.counts is None else loop


class _Experts(torch.autograd.Function):
    """``(y, e, u_in, u_out)``: the output and, for backward only, what gate_up gives and the rank-r products."""

    @staticmethod
    def forward(
        x: Tensor,
        weights: Tensor,
        order: Tensor,
        places: Tensor,
        ends: Tensor,
        settings: tuple[Any, ...],
        *flat: Any,
    ) -> tuple[Tensor | None, ...]:
        groups = Groups(order, places, ends, settings[-1])
        gate_up, down = _stacks(settings, flat)
        products = _products(groups)
        e, u_in = products.forward(products.spread(x, groups), groups, gate_up)
        if gate_up.bias is not None:
            e.add_(gate_up.bias.index_select(0, groups.experts()))
        w = weights.reshape(-1, 1).index_select(0, order)
        y, u_out = products.forward(settings[0].forward(e).mul_(w), groups, down)
        if down.bias is not None:
            y.add_(down.bias.index_select(0, groups.experts()) * w)
        return groups.collect(y), e, u_in, u_out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        x, weights, order, places, ends, ctx.settings, *flat = inputs
        _, e, u_in, u_out = output
        ctx.mark_non_differentiable(*(tensor for tensor in (e, u_in, u_out) if tensor is not None))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weights, order, places, ends, e, u_in, u_out, *flat)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        x, weights, order, places, ends, e, u_in, u_out, *flat = ctx.saved_tensors
        groups = Groups(order, places, ends, ctx.settings[-1])
        if torch.is_grad_enabled():
            return _differentiably(ctx, x, weights, groups, flat, grad)
        gate_up, down = _stacks(ctx.settings, flat)
        products = _products(groups)
        need_x, need_w = ctx.needs_input_grad[:2]
        needs = ctx.needs_input_grad[6:]
        w = weights.reshape(-1, 1).index_select(0, order)
        h, back = ctx.settings[0].again(e)
        dy = products.spread(grad, groups)
        to_down = products.backward(dy, h, u_out, groups, down, (True, *needs[6:8]), w)
        dh = to_down.rows
        grad_w = None
        if need_w:
            wide = torch.promote_types(w.dtype, torch.float32)
            by_row = h.mul_(dh).sum(1, dtype=wide)
            if down.bias is not None:
                by_row += (groups.spread(grad) * down.bias.index_select(0, groups.experts())).sum(1, dtype=wide)
            grad_w = by_row[places].to(w.dtype)
        del h, dy
        to_up = products.backward(
            back(dh.mul_(w)), products.spread(x, groups), u_in, groups, gate_up, (need_x, *needs[2:4]), None
        )
        grad_x = groups.collect(to_up.rows) if need_x else None
        found = None, None, to_up.lora_A, to_up.lora_B, None, None, to_down.lora_A, to_down.lora_B
        return grad_x, grad_w, None, None, None, None, *found


def formula(
    x: Tensor, weights: Tensor, groups: Groups, gate_up: Stack, down: Stack, gate: Gate, product: Product
) -> Tensor:
    """Return :func:`lora_experts` by operations that autograd, or a tracer, looks into, for one kind of products."""
    h = gate.plain(product(groups.spread(x), groups, gate_up))
    w = weights.reshape(-1, 1).index_select(0, groups.order)
    y = product((h * w).to(h.dtype), groups, down._replace(bias=None))
    if down.bias is not None:
        y = y + (down.bias[groups.experts()] * w).to(y.dtype)
    return y[groups.places].sum(1)


def _differentiably(
    ctx: Any, x: Tensor, weights: Tensor, groups: Groups, flat: list[Any], grad: Tensor
) -> tuple[Tensor | None, ...]:
    """Return the gradients with a graph of their own, for a second derivative: all is computed again."""
    y = formula(x, weights, groups, *_stacks(ctx.settings, flat), ctx.settings[0], _one_by_one)
    inputs = [x, weights, None, None, None, None, *flat]
    wanted = [one for one, needed in zip(inputs, ctx.needs_input_grad, strict=True) if needed]
    found = iter(torch.autograd.grad(y, wanted, grad, create_graph=True, allow_unused=True))
    return tuple(next(found) if needed else None for needed in ctx.needs_input_grad)


def _one_by_one(rows: Tensor, groups: Groups, stack: Stack) -> Tensor:
    """Return what each expert's linear layer gives for its rows, by operations that have second derivatives."""
    weight, bias = stack.weight.to(rows.dtype), None if stack.bias is None else stack.bias.to(rows.dtype)
    parts, last = [], groups.ends.tolist()
    for expert, (start, end) in enumerate(zip([0, *last], last, strict=False)):
        x, W, b = rows[start:end], weight[expert], None if bias is None else bias[expert]
        if stack.lora_A is None or stack.lora_B is None:
            parts.append(F.linear(x, W, b))
        else:
            parts.append(lora_linear(x, W, b, stack.lora_A[expert], stack.lora_B[expert], scaling=stack.scaling))
    return torch.cat(parts)
