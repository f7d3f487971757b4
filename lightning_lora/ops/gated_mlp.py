"""The tensor math of a gated MLP whose three layers are adapted, as one autograd function.

x --+-- gate --> e -- act --+
    |                       * --> h -- down --> y
    +-- up ----> g ---------+

x, e and g are saved for backward; act(e) and h are recomputed.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lora.ops.linear import (
    LinearTensors,
    ScaledDropout,
    backward_of_linears,
    by_layer,
    forward_of_linears,
    in_autocast_dtype,
    is_transformed,
    linears,
    plain_linears,
    reshape_like,
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
    x: Tensor,
    gate: LinearTensors,
    up: LinearTensors,
    down: LinearTensors,
    *,
    activation: str,
    entering: ScaledDropout,
    leaving: ScaledDropout,
) -> Tensor:
    """Return ``down(act(gate(x)) * up(x))`` of three adapted layers (Shazeer 2020), and save little for backward.

    Saved are ``x``, the outputs of gate and up, and r numbers per token of each layer: half of what the layers save one
    by one. Every step rounds as it does in them.

    Args:
        x: ``[..., hidden]``.
        gate: ``[intermediate, hidden]``; ``up`` as well; ``down`` ``[hidden, intermediate]``.
        activation: a name in :data:`ACTIVATIONS`.
        entering: scaling and dropout of the adapters of gate and up.
        leaving: scaling and dropout of the adapter of down.
    """
    return in_autocast_dtype(_gated_mlp, x, [gate, up, down], activation, entering, leaving)


def _gated_mlp(
    x: Tensor, layers: Sequence[LinearTensors], activation: str, entering: ScaledDropout, leaving: ScaledDropout
) -> Tensor:
    if is_transformed():
        e, g = plain_linears(x, layers[:2], entering)
        return plain_linears(ACTIVATIONS[activation].forward(e) * g, layers[2:], leaving)[0]
    tensors = [tensor for layer in layers for tensor in layer]
    y: Tensor = _GatedMLP.apply(x, ACTIVATIONS[activation], entering, leaving, *tensors)  # type: ignore[no-untyped-call]
    return y


class _GatedMLP(torch.autograd.Function):
    """``forward(x, activation, entering, leaving, W, b, A and B of gate, up and down) -> y``."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, act: Activation, entering: ScaledDropout, leaving: ScaledDropout, *tensors: Any
    ) -> Tensor:
        *opening, closing = by_layer(tensors)
        (e, g), h_in = forward_of_linears(x.reshape(-1, x.shape[-1]), opening, entering)
        (y,), h_out = forward_of_linears(act.forward(e).mul_(g), [closing], leaving)
        ctx.act, ctx.entering, ctx.leaving = act, entering, leaving
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, entering.seed, leaving.seed, e, g, h_in, h_out, *tensors)
        return reshape_like(x, y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        x, seed_in, seed_out, e, g, h_in, h_out, *tensors = ctx.saved_tensors
        entering, leaving = ctx.entering._replace(seed=seed_in), ctx.leaving._replace(seed=seed_out)
        *opening, closing = by_layer(tensors)
        need_x, _, _, _, *flags = ctx.needs_input_grad
        *needs, needs_closing = by_layer(flags)
        rows, grad = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        again = torch.is_grad_enabled()  # for a second derivative: autograd takes the saved e and g for constants
        if again:
            e, g = linears(rows, opening, entering)
        opened = ctx.act.forward(e)
        h = opened * g  # [T, intermediate]
        grad_h, found_closing = backward_of_linears(h, [grad], [closing], h_out, leaving, [needs_closing], need_x=True)
        assert grad_h is not None
        # opened and grad_h are new buffers: they are overwritten where no graph needs them
        grad_g = opened * grad_h if again else opened.mul_(grad_h)
        grad_e = ctx.act.grad(grad_h * g, e) if again else ctx.act.backward_into(grad_h, grad_h.mul_(g), e)
        grad_x, found = backward_of_linears(rows, [grad_e, grad_g], opening, h_in, entering, needs, need_x=need_x)
        return None if grad_x is None else grad_x.view(x.shape), None, None, None, *found, *found_closing
