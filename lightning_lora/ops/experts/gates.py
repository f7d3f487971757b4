"""What lies between the two products of an expert: ``[S, 2 * intermediate]`` in, ``[S, intermediate]`` out."""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lightning_lora.ops.gated_mlp import ACTIVATIONS


class Gate(Protocol):
    """A function of rows, without parameters, that is made again in backward."""

    def plain(self, e: Tensor) -> Tensor:
        """Return ``G(e)`` with all that autograd knows of it."""

    def forward(self, e: Tensor) -> Tensor:
        """Return ``G(e)``, in a buffer that nobody else has seen."""

    def again(self, e: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Return ``G(e)``, as above, and what takes the gradient of it, which it may overwrite, to the one of ``e``."""


class KnownGate(NamedTuple):
    """``act(a) * b`` of ``e = [a, b]``, by the name of the activation."""

    activation: str

    def plain(self, e: Tensor) -> Tensor:
        a, b = e.chunk(2, dim=1)
        return ACTIVATIONS[self.activation].forward(a) * b

    def forward(self, e: Tensor) -> Tensor:
        a, b = e.chunk(2, dim=1)
        return ACTIVATIONS[self.activation].forward(a).mul_(b)

    def again(self, e: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        activation = ACTIVATIONS[self.activation]
        a, b = e.chunk(2, dim=1)
        opened = activation.forward(a)

        def backward(grad: Tensor) -> Tensor:
            grad_e = torch.empty_like(e)
            grad_a, grad_b = grad_e.chunk(2, dim=1)
            torch.mul(grad, opened, out=grad_b)
            activation.backward_into(grad_a, grad.mul_(b), a)
            return grad_e

        return opened * b, backward


class OwnGate(NamedTuple):
    """Any other function of a module, which autograd differentiates."""

    function: Callable[[Tensor], Tensor]

    def plain(self, e: Tensor) -> Tensor:
        return self.function(e)

    def forward(self, e: Tensor) -> Tensor:
        return self.function(e).clone()  # it may be a view, or e itself

    def again(self, e: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        with torch.enable_grad():
            leaf = e.detach().requires_grad_()
            h = self.function(leaf)
        return h.detach().clone(), lambda grad: torch.autograd.grad(h, leaf, grad)[0]
