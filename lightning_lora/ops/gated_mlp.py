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
from lightning_lora.ops.linear import BACKWARD, FORWARD, PLAIN, cast_as_autocast, reshape_like
from lightning_lora.ops.linear_tensors import LinearTensors, ScaledDropout, StoredLinearTensors
from lightning_lora.ops.mixture import Shares
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
    entering: ScaledDropout | Shares,
    leaving: ScaledDropout | Shares,
    pairs: tuple[Sequence[LinearTensors], Sequence[LinearTensors]] = ((), ()),
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
        pairs: in a mixture the factors of all shares, of gate and up, and of down.
    """
    layers: Sequence[LinearTensors] = [gate, up, *pairs[0], down, *pairs[1]]
    num_opening = 2 + len(pairs[0])
    dtype = autocast_dtype(x)
    if dtype is not None:
        x, layers = cast_as_autocast(x, layers, dtype)
        with torch.autocast(x.device.type, enabled=False):
            gate, up, *pairs_in = layers[:num_opening]
            down, *pairs_out = layers[num_opening:]
            terms: Any = {"activation": activation, "entering": entering, "leaving": leaving}
            return lora_gated_mlp(x, gate, up, down, **terms, pairs=(pairs_in, pairs_out))
    act = ACTIVATIONS[activation]
    if is_transformed():
        return _plain_gated_mlp(x, layers, num_opening, act, entering, leaving)
    if gate.is_stored or up.is_stored or down.is_stored:
        entering = entering._replace(has_stored=True)
    settings = act, num_opening, entering, leaving
    y: Tensor = _GatedMLP.apply(x, *settings, *chain.from_iterable(layers))  # type: ignore[no-untyped-call]
    return y


def _plain_gated_mlp(
    x: Tensor, layers: Sequence[LinearTensors], num_opening: int, act: Activation, entering: Any, leaving: Any
) -> Tensor:
    """Return :func:`lora_gated_mlp` by operations that torch can transform."""
    e, g = PLAIN[type(entering)](x, layers[:num_opening], entering)
    y: Tensor = PLAIN[type(leaving)](act.forward(e) * g, layers[num_opening:], leaving)[0]
    return y


class _GatedMLP(torch.autograd.Function):
    """``forward(x, activation, num_opening, entering, leaving, W, b, A and B of each layer) -> y``.

    The first ``num_opening`` layers are gate and up, in a mixture with the factors of its shares.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, act: Activation, num_opening: int, entering: Any, leaving: Any, *tensors: Any
    ) -> Tensor:
        dense, n = dense_like if entering.has_stored else None, 4 * num_opening
        (e, g), h_in = FORWARD[type(entering)](x.reshape(-1, x.shape[-1]), tensors[:n], entering, dense)
        (y,), h_out = FORWARD[type(leaving)](act.forward(e).mul_(g), tensors[n:], leaving, dense)
        ctx.act, ctx.num_opening, ctx.entering, ctx.leaving, ctx.stored = act, num_opening, entering, leaving, None
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
            layers = [kind(*tensors[i : i + 4]) for i in range(0, len(tensors), 4)]
            y = _plain_gated_mlp(x, layers, ctx.num_opening, ctx.act, entering, leaving)
            return differentiable_gradients(ctx, y, [x, None, None, None, None, *tensors], grad)
        (need_x, _, _, _, _, *needs), n = ctx.needs_input_grad, 4 * ctx.num_opening
        rows, grad = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        opened = ctx.act.forward(e)
        h = opened * g  # [T, intermediate]
        grad_h, of_down = BACKWARD[type(leaving)](
            h, [grad], tensors[n:], h_out, leaving, needs[n:], need_x=True, dense=dense
        )
        assert grad_h is not None
        grad_g = opened.mul_(grad_h)
        grad_e = ctx.act.backward_into(grad_h, grad_h.mul_(g), e)
        grad_x, of_both = BACKWARD[type(entering)](
            rows, [grad_e, grad_g], tensors[:n], h_in, entering, needs[:n], need_x=need_x, dense=dense
        )
        return None if grad_x is None else grad_x.view(x.shape), None, None, None, None, *of_both, *of_down


def differentiable_gradients(ctx: Any, y: Tensor, inputs: Sequence[Any], grad: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients of an autograd function's inputs with a graph of their own, for a second derivative.

    Args:
        y: the function's output, recomputed from ``inputs`` by operations that are differentiable twice.
        inputs: those of the function; ``None`` for those that never need a gradient.
    """
    wanted = [one for one, needed in zip(inputs, ctx.needs_input_grad, strict=True) if needed]
    found = iter(torch.autograd.grad(y, wanted, grad, create_graph=True, allow_unused=True))
    return tuple(next(found) if needed else None for needed in ctx.needs_input_grad)
