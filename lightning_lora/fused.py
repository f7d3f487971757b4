"""The tensor math of several adapted linear layers at once: siblings that share an input, and a whole gated MLP.

    siblings (q, k, v)              gated MLP
    x --+-- W_1, B_1 A_1 --> y_1    x --+-- gate --> e -- act --+
        +-- W_2, B_2 A_2 --> y_2        |                       * --> h -- down --> y
        +-- W_3, B_3 A_3 --> y_3        +-- up ----> g ---------+

All A's of siblings make one product, their gradients to x are accumulated in one buffer, and one dropout mask serves
them. The MLP keeps x, e and g for backward, and makes act(e) and h again.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lora.functional import (
    adapter_first,
    autocast_dtype,
    down,
    grad_input,
    grad_of_B,
    keep_mask,
    scaled_mm,
    skinny,
    sum_of_products,
)


class Factors(NamedTuple):
    """The tensors of one adapted linear layer: ``weight`` ``[out, in]``, A ``[r, in]``, B ``[out, r]``."""

    weight: Tensor
    bias: Tensor | None
    lora_A: Tensor
    lora_B: Tensor


class Term(NamedTuple):
    """How the adapters of one input enter: their common factor, and what is dropped of the input before them.

    ``columns`` says where the input lies when it is a slice of features, as in
    :func:`~lightning_lora.functional.lora_linear`.
    """

    scaling: float
    dropout: float = 0.0
    seed: Tensor | None = None
    columns: tuple[int, int] | None = None

    @property
    def factor(self) -> float:
        """What a product with the kept entries is multiplied by."""
        return self.scaling / (1 - self.dropout)

    def kept(self, rows: Tensor, num_columns: int | None = None) -> Tensor | None:
        """Return the mask of the entries that are kept, ``[T, in]``, if any are dropped."""
        if self.seed is None:
            return None
        return keep_mask(self.seed, rows, self.dropout, self.columns, num_columns=num_columns)


class Activation(NamedTuple):
    """An elementwise function and its backward, ``(gradient, input) -> gradient``, in one kernel and differentiable."""

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]
    differentiable_backward: Callable[[Tensor, Tensor], Tensor] | None = None  # where that is another

    def grad(self, grad: Tensor, e: Tensor) -> Tensor:
        """Return the gradient of the input, with a graph where gradients are on."""
        again = torch.is_grad_enabled() and self.differentiable_backward is not None
        return (self.differentiable_backward if again else self.backward)(grad, e)  # type: ignore[misc]


def _silu_backward(grad: Tensor, e: Tensor) -> Tensor:
    sigmoid = torch.sigmoid(e)
    return grad * sigmoid * (1 + e * (1 - sigmoid))


ACTIVATIONS: dict[str, Activation] = {
    "silu": Activation(F.silu, torch.ops.aten.silu_backward.default, _silu_backward),
    "gelu_tanh": Activation(
        lambda e: F.gelu(e, approximate="tanh"),
        lambda grad, e: torch.ops.aten.gelu_backward.default(grad, e, approximate="tanh"),
    ),
    "gelu": Activation(F.gelu, torch.ops.aten.gelu_backward.default),
    "relu": Activation(F.relu, lambda grad, e: torch.ops.aten.threshold_backward.default(grad, e, 0)),
}


def lora_linears(x: Tensor, layers: Sequence[Factors], term: Term) -> tuple[Tensor, ...]:
    """Return ``x W_i^T + b_i + scaling * dropout(x) A_i^T B_i^T`` for every layer i, with one product for all A's.

    Kept for backward are ``x`` and the r numbers per token of each layer. Autocast is followed as in ``F.linear``.

    Args:
        x: ``[..., in_features]``.
        layers: of one ``in_features``; sizes of outputs and ranks are their own.
        term: the same for all of them.

    Returns:
        One ``[..., out_features_i]`` per layer.
    """
    if autocast_dtype(x) is None:
        return _siblings(x, layers, _live(term))
    x, layers = _in_autocasts_dtype(x, layers)
    with torch.autocast(x.device.type, enabled=False):
        return _siblings(x, layers, _live(term))


def lora_gated_mlp(
    x: Tensor, gate: Factors, up: Factors, down: Factors, *, activation: str, entering: Term, leaving: Term
) -> Tensor:
    """Return ``down(act(gate(x)) * up(x))`` of three adapted layers (Shazeer 2020), and keep little for backward.

    Kept are ``x``, the outputs of gate and up, and r numbers per token of each layer: half of what the layers keep one
    by one. Every step rounds as it does in them.

    Args:
        x: ``[..., hidden]``.
        gate: ``[intermediate, hidden]``; ``up`` as well; ``down`` ``[hidden, intermediate]``.
        activation: a name in :data:`ACTIVATIONS`.
        entering: how the adapters of gate and up enter.
        leaving: how the one of down does.
    """
    entering, leaving = _live(entering), _live(leaving)
    if autocast_dtype(x) is None:
        return _gated_mlp(x, (gate, up, down), activation, entering, leaving)
    x, layers = _in_autocasts_dtype(x, (gate, up, down))
    with torch.autocast(x.device.type, enabled=False):
        return _gated_mlp(x, layers, activation, entering, leaving)


def _gated_mlp(x: Tensor, layers: Sequence[Factors], activation: str, entering: Term, leaving: Term) -> Tensor:
    flat = [tensor for layer in layers for tensor in layer]
    outputs = _GatedMLP.apply(  # type: ignore[no-untyped-call]  # untyped in torch
        x, entering.seed, leaving.seed, activation, _plain(entering), _plain(leaving), *flat
    )
    y: Tensor = outputs[0]
    return y


def _live(term: Term) -> Term:
    return term if term.seed is not None and term.dropout else term._replace(dropout=0.0, seed=None)


def _plain(term: Term) -> tuple[float, float, tuple[int, int] | None]:
    return term.scaling, term.dropout, term.columns


def _in_autocasts_dtype(x: Tensor, layers: Sequence[Factors]) -> tuple[Tensor, list[Factors]]:
    dtype = autocast_dtype(x)
    if dtype is None or x.dtype == torch.float64:  # autocast leaves float64 alone
        return x, list(layers)
    cast = [
        layer._replace(weight=layer.weight.to(dtype), bias=None if layer.bias is None else layer.bias.to(dtype))
        for layer in layers
    ]
    return x.to(dtype), cast


def _siblings(x: Tensor, layers: Sequence[Factors], term: Term) -> tuple[Tensor, ...]:
    flat = [tensor for layer in layers for tensor in layer]
    *outputs, _ = _Siblings.apply(x, term.seed, _plain(term), *flat)  # type: ignore[no-untyped-call]
    return tuple(outputs)


def _in_fours(flat: Sequence[Any]) -> list[Any]:
    return [Factors(*flat[i : i + 4]) for i in range(0, len(flat), 4)]


def _together(factors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Return the A's one below the other: ``[sum of ranks, in]``."""
    return torch.cat(list(factors)).to(dtype)


class _Siblings(torch.autograd.Function):
    """``(y_1, ..., y_n, h)``: the outputs and, for backward only, ``h = kept * x [A_1; ...; A_n]^T``."""

    @staticmethod
    def forward(x: Tensor, seed: Tensor | None, settings: tuple[Any, ...], *flat: Any) -> tuple[Tensor, ...]:
        scaling, dropout, columns = settings
        term, layers = Term(scaling, dropout, seed, columns), _in_fours(flat)
        rows = x.reshape(-1, x.shape[-1])  # [T, in]
        outputs, h = _forward_of_siblings(rows, layers, term)
        return *(_like(x, y) for y in outputs), h

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, seed, ctx.settings, *flat = inputs
        h = output[-1]
        ctx.mark_non_differentiable(h)
        ctx.set_materialize_grads(False)
        needs = _in_fours(ctx.needs_input_grad[3:])
        needs_x = any(need.weight or need.lora_A or need.lora_B for need in needs)
        ctx.x_shape = x.shape
        ctx.save_for_backward(x if needs_x else None, seed, h if any(need.lora_B for need in needs) else None, *flat)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, seed, h, *flat = ctx.saved_tensors
        (scaling, dropout, columns), layers = ctx.settings, _in_fours(flat)
        needs = _in_fours(ctx.needs_input_grad[3:])
        rows = None if x is None else x.reshape(-1, x.shape[-1])
        grad_x, found = _backward_of_siblings(
            rows,
            [None if grad is None else grad.reshape(-1, grad.shape[-1]) for grad in grads[:-1]],
            layers,
            h,
            Term(scaling, dropout, seed, columns),
            needs,
            need_x=ctx.needs_input_grad[0],
        )
        return None if grad_x is None else grad_x.view(ctx.x_shape), None, None, *found


class _GatedMLP(torch.autograd.Function):
    """``(y, e, g, h_in, h_out)``: the output and, for backward only, what gate and up give and the rank-r products."""

    @staticmethod
    def forward(
        x: Tensor,
        seed_in: Tensor | None,
        seed_out: Tensor | None,
        activation: str,
        settings_in: tuple[Any, ...],
        settings_out: tuple[Any, ...],
        *flat: Any,
    ) -> tuple[Tensor, ...]:
        entering, leaving = _term(settings_in, seed_in), _term(settings_out, seed_out)
        *siblings, last = _in_fours(flat)
        rows = x.reshape(-1, x.shape[-1])  # [T, hidden]
        (e, g), h_in = _forward_of_siblings(rows, siblings, entering)
        h = ACTIVATIONS[activation].forward(e).mul_(g)  # [T, intermediate]
        h_out = down(h, last.lora_A, leaving.kept(h))
        y = sum_of_products(h, last.weight, last.bias, h_out, last.lora_B, leaving.factor)
        return _like(x, y), e, g, h_in, h_out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, seed_in, seed_out, ctx.activation, ctx.settings_in, ctx.settings_out, *flat = inputs
        _, e, g, h_in, h_out = output
        ctx.mark_non_differentiable(e, g, h_in, h_out)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, seed_in, seed_out, e, g, h_in, h_out, *flat)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        x, seed_in, seed_out, e, g, h_in, h_out, *flat = ctx.saved_tensors
        entering, leaving = _term(ctx.settings_in, seed_in), _term(ctx.settings_out, seed_out)
        *siblings, last = _in_fours(flat)
        *needs, needs_last = _in_fours(ctx.needs_input_grad[6:])
        rows, grad = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        act = ACTIVATIONS[ctx.activation]
        again = torch.is_grad_enabled()  # a second derivative: make again, with a graph, what autograd takes as given
        if again:
            e, g = _siblings(rows, siblings, entering)
        opened = act.forward(e)
        h = opened * g
        kept = leaving.kept(h)
        if again:
            h_out = down(h, last.lora_A, kept)
        grad_h, found_last = _backward_of_one(grad, h, last, h_out, leaving.factor, kept, needs_last)
        # all three are buffers of our own
        grad_g = opened * grad_h if again else opened.mul_(grad_h)
        grad_e = act.grad(grad_h * g if again else grad_h.mul_(g), e)
        need_x = ctx.needs_input_grad[0]
        grad_x, found = _backward_of_siblings(rows, [grad_e, grad_g], siblings, h_in, entering, needs, need_x=need_x)
        return None if grad_x is None else grad_x.view(x.shape), *(None,) * 5, *found, *found_last


_INPUTS = inspect.Signature([inspect.Parameter("inputs", inspect.Parameter.VAR_POSITIONAL)])
_Siblings.forward.__signature__ = _INPUTS  # type: ignore[attr-defined]  # see functional._LoRALinear
_GatedMLP.forward.__signature__ = _INPUTS  # type: ignore[attr-defined]


def _term(settings: tuple[Any, ...], seed: Tensor | None) -> Term:
    scaling, dropout, columns = settings
    return Term(scaling, dropout, seed, columns)


def _like(x: Tensor, y: Tensor) -> Tensor:
    # not a view to autograd: the caller may change the output in place
    shaped: Tensor = torch.ops.aten._unsafe_view.default(y, [*x.shape[:-1], y.shape[-1]])
    return shaped


def _forward_of_siblings(rows: Tensor, layers: Sequence[Any], term: Term) -> tuple[list[Tensor], Tensor]:
    """Return the outputs ``[T, out_i]`` and ``h`` ``[T, sum of ranks]``."""
    h = down(rows, _together([layer.lora_A for layer in layers], rows.dtype), term.kept(rows))
    parts = h.split([layer.lora_A.shape[0] for layer in layers], dim=1)
    outputs = [
        sum_of_products(rows, layer.weight, layer.bias, part, layer.lora_B, term.factor)
        for layer, part in zip(layers, parts, strict=True)
    ]
    return outputs, h


def _backward_of_siblings(
    rows: Tensor | None,
    grads: Sequence[Tensor | None],
    layers: Sequence[Any],
    h: Tensor | None,
    term: Term,
    needs: Sequence[Any],
    *,
    need_x: bool,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Return the gradient of x, ``[T, in]``, and those of each layer's four tensors. A layer without one gives none."""
    found: list[Any] = [None] * (4 * len(layers))
    ranks = [layer.lora_A.shape[0] for layer in layers]
    active = [i for i, grad in enumerate(grads) if grad is not None]
    if not active:
        return None, found
    used: list[Any] = [(grads[i], layers[i], needs[i], 4 * i) for i in active]
    first_grad = used[0][0]
    kept = term.kept(first_grad if rows is None else rows, layers[0].lora_A.shape[1])
    grad_x = None
    if need_x or any(need.lora_A for _, _, need, _ in used):
        v = _products_with_B(used)  # [T, sum of ranks]
        if need_x:
            grad_x = _grad_of_shared_input(used, v, term.factor, kept)
        if any(need.lora_A for _, _, need, _ in used):
            assert rows is not None
            grad_A = scaled_mm(v.t(), rows if kept is None else rows * kept, term.factor, layers[0].lora_A.dtype)
            for (_, _, need, place), part in zip(used, grad_A.split([ranks[i] for i in active]), strict=True):
                found[place + 2] = part if need.lora_A else None
    if any(need.lora_B for _, _, need, _ in used):
        if torch.is_grad_enabled():  # h is a constant to autograd: make it again for a second derivative
            assert rows is not None
            h = down(rows, _together([layer.lora_A for layer in layers], rows.dtype), kept)
        assert h is not None
        parts = h.split(ranks, dim=1)
        for i, (grad, layer, need, place) in zip(active, used, strict=True):
            if need.lora_B:
                found[place + 3] = grad_of_B(parts[i], grad, term.factor, layer.lora_B.dtype)
    for grad, layer, need, place in used:
        found[place : place + 2] = _grads_of_base(grad, rows, layer, need)
    return grad_x, found


def _products_with_B(used: Sequence[Any]) -> Tensor:
    """Return ``[dy_1 B_1, ..., dy_n B_n]``, ``[T, sum of ranks]``, in the layout that is fast on the device."""
    pairs = [(grad, layer.lora_B.to(grad.dtype)) for grad, layer, _, _ in used]
    if torch.is_grad_enabled():
        return torch.cat([skinny(grad, B.t()) for grad, B in pairs], dim=1)
    first: Tensor = pairs[0][0]
    ranks = [B.shape[1] for _, B in pairs]
    if first.device.type == "cpu":
        flat = first.new_empty(sum(ranks), first.shape[0])
        for (grad, B), part in zip(pairs, flat.split(ranks), strict=True):
            torch.mm(B.t(), grad.t(), out=part)
        return flat.t()
    flat = first.new_empty(first.shape[0], sum(ranks))
    for (grad, B), part in zip(pairs, flat.split(ranks, dim=1), strict=True):
        torch.mm(grad, B, out=part)
    return flat


def _grad_of_shared_input(used: Sequence[Any], v: Tensor, factor: float, kept: Tensor | None) -> Tensor:
    """Return ``sum_i dy_i W_i + factor * kept * (v [A_1; ...; A_n])``, ``[T, in]``, in one buffer."""
    A = _together([layer.lora_A for _, layer, _, _ in used], v.dtype)
    products: list[tuple[Tensor, Tensor]] = [(grad, layer.weight) for grad, layer, _, _ in used]
    if kept is None and not adapter_first(v.device):
        (grad, weight), *products = products
        total: Tensor = torch.mm(grad, weight)
        for grad, weight in products:
            total.addmm_(grad, weight)
        return total.addmm_(v, A, alpha=factor)
    total = scaled_mm(v, A, factor)
    if kept is not None:
        total.mul_(kept)
    for grad, weight in products:
        total.addmm_(grad, weight)
    return total


def _backward_of_one(
    grad: Tensor, rows: Tensor, layer: Factors, h: Tensor, factor: float, kept: Tensor | None, need: Any
) -> tuple[Tensor, list[Tensor | None]]:
    """Return the gradient of one layer's input, ``[T, in]``, and those of its four tensors."""
    v = skinny(grad, layer.lora_B.to(grad.dtype).t())
    grad_rows = grad_input(grad, layer.weight, v, layer.lora_A, factor, kept)
    grad_A = grad_B = None
    if need.lora_A:
        grad_A = scaled_mm(v.t(), rows if kept is None else rows * kept, factor, layer.lora_A.dtype)
    if need.lora_B:
        grad_B = grad_of_B(h, grad, factor, layer.lora_B.dtype)
    return grad_rows, [*_grads_of_base(grad, rows, layer, need), grad_A, grad_B]


def _grads_of_base(grad: Tensor, rows: Tensor | None, layer: Factors, need: Any) -> list[Tensor | None]:
    grad_weight = grad_bias = None
    if need.weight:
        assert rows is not None
        grad_weight = torch.mm(grad.t(), rows)
    if need.bias:
        assert layer.bias is not None
        grad_bias = grad.sum(0).to(layer.bias.dtype)
    return [grad_weight, grad_bias]
