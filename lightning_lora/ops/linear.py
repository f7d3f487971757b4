"""The tensor math of LoRA: no modules, no process groups.

x [..., in] --+-- W_1 [out_1, in] frozen ------------------- + --> y_1 [..., out_1]
     \\        |                                             |
      dropout -- A_1 [r, in] -- h_1 [..., r] -- B_1 [out_1, r] * scaling
              |
              +-- W_2, A_2, B_2 --> y_2 ...

Base and adapter are one autograd function. It serves one layer, or several that share their input: then all A's make
one product, their gradients to x are accumulated in one buffer, and one dropout mask serves them.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from lightning_lora.ops.dropout import keep_mask
from lightning_lora.ops.products import down, grad_input, grad_of_B, inner_gradients, scaled_mm, sum_of_products


class Factors(NamedTuple):
    """The tensors of one adapted linear layer: A ``[r, in]``, B ``[out, r]``; ``weight`` ``[out, in]``, or no base."""

    weight: Tensor | None
    bias: Tensor | None
    lora_A: Tensor
    lora_B: Tensor


class Term(NamedTuple):
    """How the adapters of one input enter: the arguments of :func:`lora_linear` of the same names."""

    scaling: float
    dropout: float = 0.0
    seed: Tensor | None = None
    columns: tuple[int, int] | None = None
    first_row: int = 0

    @property
    def factor(self) -> float:
        """What a product with the kept entries is multiplied by."""
        return self.scaling / (1 - self.dropout)

    def kept(self, rows: Tensor, num_columns: int | None = None) -> Tensor | None:
        """Return the mask of the entries that are kept, ``[T, in]``, if any are dropped."""
        if self.seed is None:
            return None
        return keep_mask(self.seed, rows, self.dropout, self.columns, self.first_row, num_columns=num_columns)

    def live(self) -> "Term":
        """Return the same, without a seed and a probability of which one is missing."""
        is_live = self.seed is not None and self.dropout
        return self if is_live or (self.seed is None and not self.dropout) else self._replace(dropout=0.0, seed=None)


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
    term = Term(scaling, dropout, seed, columns, first_row)
    (y,) = lora_linears(x, [Factors(weight, bias, lora_A, lora_B)], term)
    return y


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
    term = term.live()
    dtype = autocast_dtype(x)
    if dtype is None:
        return apply_linears(x, layers, term)
    x, layers = in_dtype(dtype, x, layers)
    with torch.autocast(x.device.type, enabled=False):
        return apply_linears(x, layers, term)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return the dtype that autocast computes with where ``x`` lies, if it is on."""
    device_type = x.device.type
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def in_dtype(dtype: torch.dtype, x: Tensor, layers: Sequence[Factors]) -> tuple[Tensor, list[Factors]]:
    """Return what ``F.linear`` computes with when autocast's dtype is ``dtype``."""
    if x.dtype == torch.float64:  # autocast leaves float64 alone
        return x, list(layers)

    def cast(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(dtype)

    return x.to(dtype), [layer._replace(weight=cast(layer.weight), bias=cast(layer.bias)) for layer in layers]


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
    # forward-mode AD and traces do not see no_grad
    return norms.clamp_min(torch.finfo(dtype).tiny).detach()


def rescaled(y: Tensor, ratio: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``ratio * (y - b) + b`` in the dtype of ``y``, computed in ``ratio``'s: equal to ``y`` where it is 1.

    Args:
        y: ``[..., out_features]``, or any shape that the others broadcast against.
    """
    offset = torch.zeros_like(ratio) if bias is None else (1 - ratio) * bias
    return torch.addcmul(offset, y, ratio).to(y.dtype)


def apply_linears(x: Tensor, layers: Sequence[Factors], term: Term) -> tuple[Tensor, ...]:
    """Return :func:`lora_linears` of what is in the dtype to compute with already."""
    if is_transformed():
        return plain_linears(x, layers, term)
    *outputs, _ = run(_LoRALinears, x, *settings(term), *(tensor for layer in layers for tensor in layer))
    return tuple(outputs)


def is_transformed() -> bool:
    """Whether torch transforms what runs (``torch.func``, forward-mode AD) or records it (``torch.jit.trace``).

    Layers are then computed by torch's own operations: they can be transformed, an autograd function cannot.
    """
    if torch.compiler.is_compiling():
        return bool(_has_transforms())
    return torch._C._are_functorch_transforms_active() or torch._C._is_tracing() or forward_ad._current_level >= 0


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _has_transforms() -> bool:
    """Return the same where code is compiled: in a graph, transforms are fixed."""
    return torch._C._are_functorch_transforms_active()


def plain_linears(x: Tensor, layers: Sequence[Factors], term: Term) -> tuple[Tensor, ...]:
    """Compute what :func:`lora_linears` does by operations that torch can transform."""
    rows = x.reshape(-1, x.shape[-1])
    kept = term.kept(rows)
    entering = (rows if kept is None else rows * kept).view(x.shape)
    outputs = []
    for layer in layers:
        h = F.linear(entering, layer.lora_A.to(x.dtype)) * term.factor
        y = F.linear(h, layer.lora_B.to(x.dtype))
        outputs.append(y if layer.weight is None else F.linear(x, layer.weight, layer.bias) + y)
    return tuple(outputs)


def run(function: Any, *inputs: Any) -> tuple[Tensor, ...]:
    """Return what an autograd function gives; where no gradient is wanted, by its forward alone.

    That is less work, and torch.compile can look into it: it takes such a function's context for its first input.
    """
    wanted = torch.is_grad_enabled() and any(isinstance(one, Tensor) and one.requires_grad for one in inputs)
    outputs: tuple[Tensor, ...] = apply(function, *inputs) if wanted else function.forward(*inputs)
    return outputs


_unwrap_if_dead: Any = torch._C._functorch.unwrap_if_dead


def apply(function: Any, *inputs: Any) -> Any:
    """Return ``function.apply(*inputs)`` for an autograd function whose inputs are given by place.

    In eager mode ``apply`` binds the inputs to the signature of ``forward``, which takes longer than a small product:
    here all else that it does is done without it.
    """
    if torch.compiler.is_compiling():
        return function.apply(*inputs)
    live = [_unwrap_if_dead(one) if isinstance(one, Tensor) else one for one in inputs]  # of ended transforms
    return super(torch.autograd.Function, function).apply(*live)


def settings(term: Term) -> tuple[Tensor | None, tuple[Any, ...]]:
    """Return the seed, which autograd is to see, and the rest: :func:`term_of` takes them."""
    return term.seed, (term.scaling, term.dropout, term.columns, term.first_row)


def term_of(seed: Tensor | None, rest: tuple[Any, ...]) -> Term:
    """Return the term that :func:`settings` was given."""
    scaling, dropout, columns, first_row = rest
    return Term(scaling, dropout, seed, columns, first_row)


def in_fours(flat: Sequence[Any]) -> list[Any]:
    """Return one :class:`Factors` for every four of what belongs to tensors of layers."""
    return [Factors(*flat[i : i + 4]) for i in range(0, len(flat), 4)]


_unsafe_view: Any = torch.ops.aten._unsafe_view.default


def like(x: Tensor, y: Tensor) -> Tensor:
    """Return ``y`` ``[T, out]`` in the leading shape of ``x``."""
    # not a view to autograd: the caller may change the output in place, as nn.ReLU(inplace=True) does
    return y if x.ndim == 2 else _unsafe_view(y, [*x.shape[:-1], y.shape[-1]])


class _LoRALinears(torch.autograd.Function):
    """``(y_1, ..., y_n, h)``: the outputs and, for backward only, ``h = kept * x [A_1; ...; A_n]^T``."""

    @staticmethod
    def forward(x: Tensor, seed: Tensor | None, rest: tuple[Any, ...], *flat: Any) -> tuple[Tensor, ...]:
        outputs, h = forward_of_linears(x.reshape(-1, x.shape[-1]), in_fours(flat), term_of(seed, rest))
        return *(like(x, y) for y in outputs), h

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, seed, ctx.rest, *flat = inputs
        h = output[-1]
        ctx.mark_non_differentiable(h)
        ctx.set_materialize_grads(False)
        needs = ctx.needs_input_grad[3:]  # of a weight, a bias, A and B in turn
        if not ctx.needs_input_grad[0]:
            flat[::4] = [None] * len(flat[::4])
        flat[1::4] = [None] * len(flat[1::4])
        reads_h = any(needs[3::4])
        reads_x = reads_h or any(needs[2::4]) or any(needs[::4])
        ctx.save_for_backward(x if reads_x else None, seed, h if reads_h else None, *flat)
        ctx.x_shape = x.shape

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, seed, h, *flat = ctx.saved_tensors
        grad_x, found = backward_of_linears(
            None if x is None else x.reshape(-1, x.shape[-1]),
            [None if grad is None else grad.reshape(-1, grad.shape[-1]) for grad in grads[:-1]],
            in_fours(flat),
            h,
            term_of(seed, ctx.rest),
            in_fours(ctx.needs_input_grad[3:]),
            need_x=ctx.needs_input_grad[0],
        )
        return None if grad_x is None else grad_x.view(ctx.x_shape), None, None, *found


def forward_of_linears(rows: Tensor, layers: Sequence[Any], term: Term) -> tuple[list[Tensor], Tensor]:
    """Return the outputs ``[T, out_i]`` and ``h`` ``[T, sum of ranks]``."""
    h = down(rows, _together(layers, rows.dtype), term.kept(rows))
    outputs = [
        sum_of_products(rows, layer.weight, layer.bias, part, layer.lora_B, term.factor)
        for layer, part in zip(layers, _by_rank(h, 1, layers), strict=True)
    ]
    return outputs, h


def backward_of_linears(
    rows: Tensor | None,
    grads: Sequence[Tensor | None],
    layers: Sequence[Any],
    h: Tensor | None,
    term: Term,
    needs: Sequence[Any],
    *,
    need_x: bool,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Return the gradient of x, ``[T, in]``, and those of each layer's four tensors. A layer without one gives none.

    ``rows`` ``[T, in]`` may be missing when only x needs a gradient; ``h`` is what forward returned.
    """
    found: list[Tensor | None] = [None] * (4 * len(layers))
    places = [place for place, grad in enumerate(grads) if grad is not None]
    if not places:
        return None, found
    given: list[Any] = [grad for grad in grads if grad is not None]
    used, wanted = [layers[place] for place in places], [needs[place] for place in places]
    kept = term.kept(given[0] if rows is None else rows, layers[0].lora_A.shape[1])
    grad_x, need_A, need_B = None, any(need.lora_A for need in wanted), any(need.lora_B for need in wanted)
    grads_A: Sequence[Any] = used
    if need_x or need_A:
        v = inner_gradients(given, [layer.lora_B for layer in used])  # [T, sum of ranks]
        if need_x:
            products = [(grad, layer.weight) for grad, layer in zip(given, used, strict=True)]
            products = [] if used[0].weight is None else products
            grad_x = grad_input(products, v, _together(used, v.dtype), term.factor, kept)
        if need_A:
            assert rows is not None
            whole = scaled_mm(v.t(), rows if kept is None else rows * kept, term.factor, used[0].lora_A.dtype)
            grads_A = _by_rank(whole, 0, used)
    if need_B and torch.is_grad_enabled():  # h is a constant to autograd: make it again for a second derivative
        assert rows is not None
        h = down(rows, _together(layers, rows.dtype), kept)
    parts: Sequence[Any] = layers if h is None else _by_rank(h, 1, layers)
    for place, grad, layer, need, grad_A in zip(places, given, used, wanted, grads_A, strict=True):
        if need.weight:
            assert rows is not None
            found[4 * place] = torch.mm(grad.t(), rows)
        if need.bias:
            found[4 * place + 1] = grad.sum(0)
        if need.lora_A:
            found[4 * place + 2] = grad_A
        if need.lora_B:
            found[4 * place + 3] = grad_of_B(parts[place], grad, term.factor, layer.lora_B.dtype)
    return grad_x, found


def _by_rank(stacked: Tensor, dim: int, layers: Sequence[Any]) -> Sequence[Tensor]:
    """Return each layer's part of what is made of all A's."""
    return [stacked] if len(layers) == 1 else stacked.split([layer.lora_A.shape[0] for layer in layers], dim)


def _together(layers: Sequence[Any], dtype: torch.dtype) -> Tensor:
    """Return the A's one below the other: ``[sum of ranks, in]``."""
    stacked: Tensor = layers[0].lora_A if len(layers) == 1 else torch.cat([layer.lora_A for layer in layers])
    return stacked.to(dtype)
