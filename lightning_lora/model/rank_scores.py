"""Scores of the ranks of AdaLoRA's layers, and the loss term that keeps their factors orthonormal.

A rank's score is the importance of its entry of E plus the average importances of its row of A and its column of B
(Zhang et al. 2023, sec. 3.2). The importance of a parameter p with gradient g is ``S * U``: S averages ``|p g|`` over
the steps, U averages how far each step's ``|p g|`` is from S.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from lightning_lora.adalora import AdaLoRA
from lightning_lora.layers.adalora import AdaLoRALinear
from lightning_lora.ops.guarded import bare

FACTORS = ("lora_A", "lora_B", "lora_E")


class AlikeLayers:
    """Layers of one shape, whose factors are computed together as stacks ``[n, ...]``, in float32 or wider.

    Attributes:
        layers: by name.
        averages: S and U of each factor, once a step was taken in.
        kept: ``[n, r]``, which ranks the last pruning kept; ``None`` before the first.
    """

    def __init__(self, layers: dict[str, AdaLoRALinear]) -> None:
        self.layers = layers
        self.averages: dict[str, tuple[Tensor, Tensor]] = {}
        self.kept: Tensor | None = None

    def _factors(self, name: str) -> list[nn.Parameter]:
        return [getattr(layer, name) for layer in self.layers.values()]

    def add_regularizer(self, weight: float, scale: Callable[[Tensor], Tensor] | None) -> Tensor:
        """Add ``weight`` times the gradient of each norm; return ``weight`` times their sum."""
        values = []
        for name in FACTORS[:2]:
            factors = self._factors(name)
            rows = _stacked(factors)  # [n, r, in_features]
            rows = rows if name == "lora_A" else rows.mT  # [n, r, out_features]
            difference = rows @ rows.mT  # [n, r, r]
            difference.diagonal(dim1=1, dim2=2).sub_(1)
            norms = torch.linalg.matrix_norm(difference)  # [n]
            # the gradient of a norm at zero is taken as zero
            slopes = torch.where(norms > 0, 2 * weight / norms, 0.0)
            gradients = slopes[:, None, None] * (difference @ rows)
            gradients = gradients if scale is None else scale(gradients)
            for factor, gradient in zip(factors, gradients, strict=True):
                _add_gradient(factor, gradient if name == "lora_A" else gradient.mT)
            values.append(weight * norms.sum())
        return torch.stack(values).sum()

    def take_in(self, settings: AdaLoRA, scale: Tensor | None) -> None:
        """Move the averages towards this step's ``|p g|``; a factor without a gradient has the gradient zero."""
        for name in FACTORS:
            factors = self._factors(name)
            gradients = [torch.zeros_like(p) if p.grad is None else bare(p.grad) for p in factors]
            importance = (_stacked(factors) * _stacked(gradients)).abs_()
            if scale is not None:
                importance.div_(scale)
            if name not in self.averages:
                self.averages[name] = torch.zeros_like(importance), torch.zeros_like(importance)
            sensitivity, uncertainty = self.averages[name]
            sensitivity.mul_(settings.beta1).add_(importance, alpha=1 - settings.beta1)
            change = (importance - sensitivity).abs_()
            uncertainty.mul_(settings.beta2).add_(change, alpha=1 - settings.beta2)

    def scores(self) -> Tensor:
        """Return the score of each rank, ``[n, r]``."""
        A, B, E = (torch.mul(*self.averages[name]) for name in FACTORS)
        return E.squeeze(2) + A.mean(2) + B.mean(1)

    def prune(self) -> None:
        """Set the entries of E to zero that the last pruning did not keep."""
        if self.kept is not None:
            for E, kept in zip(self._factors("lora_E"), self.kept, strict=True):
                E.masked_fill_(~kept[:, None], 0)

    def ranks(self) -> Tensor:
        """Return the number of ranks that each layer keeps, ``[n]``."""
        (E, *_) = self._factors("lora_E")
        return torch.full((len(self.layers),), E.shape[0], device=E.device) if self.kept is None else self.kept.sum(1)

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Return averages and kept ranks by the layer's name."""
        stacks = {f"{x} {name}": s for name, pair in self.averages.items() for x, s in zip("SU", pair, strict=True)}
        if self.kept is not None:
            stacks["kept"] = self.kept
        return {name: {key: s[i].cpu().clone() for key, s in stacks.items()} for i, name in enumerate(self.layers)}

    def load(self, states: list[dict[str, Tensor]]) -> None:
        """Take averages and kept ranks from the states of the layers, in their order."""
        first = self._factors("lora_A")[0]
        stacks = {key: torch.stack([state[key] for state in states]).to(first.device) for key in states[0]}
        self.kept = stacks.pop("kept", None)
        self.averages = {name: (stacks[f"S {name}"], stacks[f"U {name}"]) for name in FACTORS if stacks}


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    """Return tensors of one shape as one, in float32 or wider."""
    return torch.stack([tensor.detach() for tensor in tensors]).to(torch.promote_types(tensors[0].dtype, torch.float32))


def _add_gradient(parameter: nn.Parameter, gradient: Tensor) -> None:
    if not parameter.requires_grad:
        return
    if parameter.grad is None:
        parameter.grad = torch.empty_like(parameter).copy_(gradient)
    else:
        bare(parameter.grad).add_(gradient)
