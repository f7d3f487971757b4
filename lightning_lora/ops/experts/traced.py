"""Products of all experts as custom operators, for torch.compile and torch.export.

The operators read the numbers of rows when they run, so that no graph depends on these.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lora.ops.experts import grouped
from lightning_lora.ops.experts.records import ExpertWeights, Groups
from lightning_lora.ops.packed import FORMS
from lightning_lora.ops.packed_stack import PackedStack
from lightning_lora.ops.stored import dense_like


def product(rows: Tensor, groups: Groups, layer: ExpertWeights) -> Tensor:
    """Return ``x W_e^T + b_e + scaling * (x A_e^T) B_e^T``, ``[S, out]``, of rows ``[S, in]`` sorted by expert."""
    dtype = rows.dtype
    weight = layer.weight
    y: Tensor
    if isinstance(weight, Tensor):
        y = _product(rows, weight.to(dtype).mT, groups.ends)
    else:
        parts, described = weight.stored.tensors, (weight.stored.kind, str(weight.dtype))
        y = _packed_product(rows, *_ordered(parts), groups.ends, *described, weight.stored.shape, not weight.transposed)
    if layer.bias is not None:
        y = y + layer.bias.to(dtype)[groups.experts()]
    if layer.lora_A is None or layer.lora_B is None:
        return y
    u = _product(rows, layer.lora_A.to(dtype).mT, groups.ends)
    update: Tensor = _product(u, layer.lora_B.to(dtype).mT, groups.ends)
    return y + layer.scaling * update


@torch.library.custom_op("lightning_lora::expert_products", mutates_args=())
def _product(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Return each row times its expert's matrix: ``[S, in]``, ``[experts, in, out]`` to ``[S, out]``."""
    if grouped.takes(rows, *weight.shape[1:]):
        product: Tensor = F.grouped_mm(rows, weight, offs=ends)
        return product
    y = rows.new_empty(rows.shape[0], weight.shape[2])
    for expert, (start, end) in enumerate(_spans(ends)):
        torch.mm(rows[start:end], weight[expert], out=y[start:end])
    return y


@torch.library.custom_op("lightning_lora::expert_outer_products", mutates_args=())
def _outer(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    """Return ``left_e^T right_e`` of each expert's rows: ``[S, m]``, ``[S, n]`` to ``[experts, m, n]``."""
    products = left.new_empty(len(ends), left.shape[1], right.shape[1])
    for expert, (start, end) in enumerate(_spans(ends)):
        torch.mm(left[start:end].t(), right[start:end], out=products[expert])
    return products


@_product.register_fake
def _(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[2])


@_outer.register_fake
def _(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    return left.new_empty(ends.shape[0], left.shape[1], right.shape[1])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows, weight, ends = inputs
    ctx.save_for_backward(rows if ctx.needs_input_grad[1] else None, weight, ends)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    rows, weight, ends = ctx.saved_tensors
    need_rows, need_weight, _ = ctx.needs_input_grad
    grad_rows = _product(grad, weight.mT, ends) if need_rows else None
    return grad_rows, _outer(rows, grad, ends) if need_weight else None, None


_product.register_autograd(_backward, setup_context=_setup)


@torch.library.custom_op("lightning_lora::packed_expert_products", mutates_args=())
def _packed_product(
    rows: Tensor,
    codes: Tensor,
    scales: Tensor,
    nested: Tensor | None,
    offset: Tensor | None,
    ends: Tensor,
    kind: str,
    dtype: str,
    shape: list[int],
    transposed: bool,
) -> Tensor:
    """Return each row times its expert's matrix of a packed stack of ``shape``: ``[S, in]`` to ``[S, out]``."""
    found = {"codes": codes, "scales": scales, "nested": nested, "offset": offset}
    parts = {name: part for name, part in found.items() if part is not None}
    stored = FORMS[kind](parts, torch.Size(shape), getattr(torch, dtype.removeprefix("torch.")))
    stack = PackedStack(stored, transposed=transposed)
    y = rows.new_empty(rows.shape[0], stack.shape[2])
    for matrix, (start, end) in zip(stack.unbind(), _spans(ends), strict=True):
        if start < end:
            torch.mm(rows[start:end], dense_like(matrix, rows), out=y[start:end])
    return y


@_packed_product.register_fake
def _(
    rows: Tensor,
    codes: Tensor,
    scales: Tensor,
    nested: Tensor | None,
    offset: Tensor | None,
    ends: Tensor,
    kind: str,
    dtype: str,
    shape: list[int],
    transposed: bool,
) -> Tensor:
    return rows.new_empty(rows.shape[0], shape[1] if transposed else shape[2])


def _setup_packed(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *tensors = inputs[:6]
    ctx.save_for_backward(*tensors)
    *ctx.described, ctx.transposed = inputs[6:]


def _packed_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_rows = None
    if ctx.needs_input_grad[0]:
        grad_rows = _packed_product(grad, *ctx.saved_tensors, *ctx.described, not ctx.transposed)
    return grad_rows, *[None] * 9


_packed_product.register_autograd(_packed_backward, setup_context=_setup_packed)


def _ordered(parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    return parts["codes"], parts["scales"], parts.get("nested"), parts.get("offset")


def _spans(ends: Tensor) -> list[tuple[int, int]]:
    last = ends.tolist()
    return list(zip([0, *last], last, strict=False))
