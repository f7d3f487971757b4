"""The tensor math of a gated MLP whose three layers are adapted, as one autograd function.

x --+-- gate --> e -- act --+
    |                       * --> h -- down --> y
    +-- up ----> g ---------+

x, e and g are kept for backward; act(e) and h are made again.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lora.ops.linear import (
    Factors,
    Term,
    apply_linears,
    autocast_dtype,
    backward_of_linears,
    forward_of_linears,
    in_dtype,
    in_fours,
    is_transformed,
    like,
    plain_linears,
    run,
    settings,
    term_of,
)


class Activation(NamedTuple):
    """An elementwise function and its backward, ``(gradient, input, **options) -> gradient``, in one kernel."""

    forward: Callable[[Tensor], Tensor]
    kernel: Any  # of backward; it may write where it is told to
    options: dict[str, Any] = {}  # noqa: RUF012  # read only
    differentiable_backward: Callable[[Tensor, Tensor], Tensor] | None = None  # where the kernel has none

    def backward(self, grad: Tensor, e: Tensor) -> Tensor:
        """Return the gradient of the input."""
        found: Tensor = self.kernel.default(grad, e, **self.options)
        return found

    def backward_into(self, out: Tensor, grad: Tensor, e: Tensor) -> Tensor:
        """Write the gradient of the input to ``out``, which may be ``grad``."""
        found: Tensor = self.kernel.grad_input(grad, e, **self.options, grad_input=out)
        return found

    def grad(self, grad: Tensor, e: Tensor) -> Tensor:
        """Return the gradient of the input, with a graph where gradients are on."""
        again = torch.is_grad_enabled() and self.differentiable_backward is not None
        return (self.differentiable_backward if again else self.backward)(grad, e)  # type: ignore[misc]


def _silu_backward(grad: Tensor, e: Tensor) -> Tensor:
    sigmoid = torch.sigmoid(e)
    return grad * sigmoid * (1 + e * (1 - sigmoid))


_aten = torch.ops.aten
ACTIVATIONS: dict[str, Activation] = {
    "silu": Activation(F.silu, _aten.silu_backward, differentiable_backward=_silu_backward),
    "gelu_tanh": Activation(
        lambda e: F.gelu(e, approximate="tanh"), _aten.gelu_backward, options={"approximate": "tanh"}
    ),
    "gelu": Activation(F.gelu, _aten.gelu_backward),
    "relu": Activation(F.relu, _aten.threshold_backward, options={"threshold": 0}),
}


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
    layers, entering, leaving = [gate, up, down], entering.live(), leaving.live()
    dtype = autocast_dtype(x)
    if dtype is None:
        return _apply(x, layers, activation, entering, leaving)
    x, layers = in_dtype(dtype, x, layers)
    with torch.autocast(x.device.type, enabled=False):
        return _apply(x, layers, activation, entering, leaving)


def _apply(x: Tensor, layers: Sequence[Factors], activation: str, entering: Term, leaving: Term) -> Tensor:
    if is_transformed():
        e, g = plain_linears(x, layers[:2], entering)
        return plain_linears(ACTIVATIONS[activation].forward(e) * g, layers[2:], leaving)[0]
    (seed_in, rest_in), (seed_out, rest_out) = settings(entering), settings(leaving)
    flat = [tensor for layer in layers for tensor in layer]
    return run(_GatedMLP, x, seed_in, seed_out, activation, rest_in, rest_out, *flat)[0]


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
        *opening, closing = in_fours(flat)
        (e, g), h_in = forward_of_linears(x.reshape(-1, x.shape[-1]), opening, term_of(seed_in, settings_in))
        h = ACTIVATIONS[activation].forward(e).mul_(g)  # [T, intermediate]
        (y,), h_out = forward_of_linears(h, [closing], term_of(seed_out, settings_out))
        return like(x, y), e, g, h_in, h_out

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
        entering, leaving = term_of(seed_in, ctx.settings_in), term_of(seed_out, ctx.settings_out)
        *opening, closing = in_fours(flat)
        *needs, needs_closing = in_fours(ctx.needs_input_grad[6:])
        rows, grad = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        again = torch.is_grad_enabled()  # a second derivative: make again, with a graph, what autograd takes as given
        if again:
            e, g = apply_linears(rows, opening, entering)
        act = ACTIVATIONS[ctx.activation]
        opened = act.forward(e)
        h = opened * g
        grad_h, found_closing = backward_of_linears(h, [grad], [closing], h_out, leaving, [needs_closing], need_x=True)
        assert grad_h is not None
        # all three are buffers of our own
        grad_g = opened * grad_h if again else opened.mul_(grad_h)
        grad_e = act.grad(grad_h * g, e) if again else act.backward_into(grad_h, grad_h.mul_(g), e)
        need_x = ctx.needs_input_grad[0]
        grad_x, found = backward_of_linears(rows, [grad_e, grad_g], opening, h_in, entering, needs, need_x=need_x)
        return None if grad_x is None else grad_x.view(x.shape), *(None,) * 5, *found, *found_closing
