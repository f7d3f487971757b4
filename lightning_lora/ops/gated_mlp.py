"""The tensor math of a gated MLP whose three layers are adapted, as one autograd function.

x --+-- gate --> e -- act --+
    |                       * --> h -- down --> y
    +-- up ----> g ---------+

x, e and g are saved for backward; act(e) and h are recomputed.
"""

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lora.compat.torch import is_transformed
from lightning_lora.ops.autocast import autocast_dtype
from lightning_lora.ops.linear import (
    backward_of_linears,
    cast_as_autocast,
    forward_of_linears,
    plain_linears,
    reshape_like,
)
from lightning_lora.ops.linear_tensors import LinearTensors, ScaledDropout, StoredLinearTensors
from lightning_lora.ops.stored import apart, dense_again, dense_like, together


class Activation(NamedTuple):
    """An elementwise function and the kernel of its backward."""

    forward: Callable[[Tensor], Tensor]
    kernel: Any  # (gradient, input, **options, grad_input=out) -> out
    options: dict[str, Any] = {}  # noqa: RUF012  # read only

    def backward_into(self, out: Tensor, grad: Tensor, e: Tensor) -> Tensor:
        """Write the gradient of the input to ``out``, which may be ``grad``."""
        found: Tensor = self.kernel.grad_input(grad, e, **self.options, grad_input=out)
        return found


_aten = torch.ops.aten
ACTIVATIONS: dict[str, Activation] = {
    "silu": Activation(F.silu, _aten.silu_backward),
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
    layers: Sequence[LinearTensors] = [gate, up, down]
    dtype = autocast_dtype(x)
    if dtype is not None:
        x, layers = cast_as_autocast(x, layers, dtype)
        with torch.autocast(x.device.type, enabled=False):
            return lora_gated_mlp(x, *layers, activation=activation, entering=entering, leaving=leaving)
    act = ACTIVATIONS[activation]
    if is_transformed():
        return _plain_gated_mlp(x, layers, act, entering, leaving)
    if gate.is_stored or up.is_stored or down.is_stored:
        entering = entering._replace(has_stored=True)
    y: Tensor = _GatedMLP.apply(x, act, entering, leaving, *chain.from_iterable(layers))  # type: ignore[no-untyped-call]
    return y


def _plain_gated_mlp(
    x: Tensor, layers: Sequence[LinearTensors], act: Activation, entering: ScaledDropout, leaving: ScaledDropout
) -> Tensor:
    """Return :func:`lora_gated_mlp` by operations that torch can transform."""
    e, g = plain_linears(x, layers[:2], entering)
    return plain_linears(act.forward(e) * g, layers[2:], leaving)[0]


class _GatedMLP(torch.autograd.Function):
    """``forward(x, activation, entering, leaving, W, b, A and B of gate, up and down) -> y``."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, act: Activation, entering: ScaledDropout, leaving: ScaledDropout, *tensors: Any
    ) -> Tensor:
        dense = dense_like if entering.has_stored else None
        (e, g), h_in = forward_of_linears(x.reshape(-1, x.shape[-1]), tensors[:8], entering, dense)
        (y,), h_out = forward_of_linears(act.forward(e).mul_(g), tensors[8:], leaving, dense)
        ctx.act, ctx.entering, ctx.leaving, ctx.stored = act, entering, leaving, None
        ctx.set_materialize_grads(False)
        if entering.has_stored:
            ctx.stored, weights = apart(tensors[::4])
            tensors = tuple(weights[i // 4] if i % 4 == 0 else one for i, one in enumerate(tensors))
        ctx.save_for_backward(x, entering.seed, leaving.seed, e, g, h_in, h_out, *tensors)
        return reshape_like(x, y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        x, seed_in, seed_out, e, g, h_in, h_out, *tensors = ctx.saved_tensors
        dense = None
        if ctx.stored is not None:
            tensors[::4], dense = together(ctx.stored, tensors[::4]), dense_again
        entering, leaving = ctx.entering._replace(seed=seed_in), ctx.leaving._replace(seed=seed_out)
        if torch.is_grad_enabled():
            kind = LinearTensors if dense is None else StoredLinearTensors
            layers = [kind(*tensors[i : i + 4]) for i in (0, 4, 8)]
            y = _plain_gated_mlp(x, layers, ctx.act, entering, leaving)
            return differentiable_gradients(ctx, y, [x, None, None, None, *tensors], grad)
        need_x, _, _, _, *needs = ctx.needs_input_grad
        rows, grad = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        opened = ctx.act.forward(e)
        h = opened * g  # [T, intermediate]
        grad_h, of_down = backward_of_linears(
            h, [grad], tensors[8:], h_out, leaving, needs[8:], need_x=True, dense=dense
        )
        assert grad_h is not None
        grad_g = opened.mul_(grad_h)
        grad_e = ctx.act.backward_into(grad_h, grad_h.mul_(g), e)
        grad_x, of_both = backward_of_linears(
            rows, [grad_e, grad_g], tensors[:8], h_in, entering, needs[:8], need_x=need_x, dense=dense
        )
        return None if grad_x is None else grad_x.view(x.shape), None, None, None, *of_both, *of_down


def differentiable_gradients(ctx: Any, y: Tensor, inputs: Sequence[Any], grad: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients of an autograd function's inputs with a graph of their own, for a second derivative.

    Args:
        y: the function's output, recomputed from ``inputs`` by operations that are differentiable twice.
        inputs: those of the function; ``None`` for those that never need a gradient.
    """
    wanted = [one for one, needed in zip(inputs, ctx.needs_input_grad, strict=True) if needed]
    found = iter(torch.autograd.grad(y, wanted, grad, create_graph=True, allow_unused=True))
    return tuple(next(found) if needed else None for needed in ctx.needs_input_grad)
