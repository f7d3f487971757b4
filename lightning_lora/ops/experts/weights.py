"""The tensors that one product of all experts multiplies by, and their gradients."""

from typing import NamedTuple

from torch import Tensor


class ExpertWeights(NamedTuple):
    """The tensors of one linear layer per expert; there may be no adapter, and no bias.

    Attributes:
        weight: ``[experts, out, in]``, of any strides.
        bias: ``[experts, out]``.
        lora_A: ``[experts, r, in]``.
        lora_B: ``[experts, out, r]``.
        scaling: factor of the adapter's term.
    """

    weight: Tensor
    bias: Tensor | None
    lora_A: Tensor | None
    lora_B: Tensor | None
    scaling: float


class Gradients(NamedTuple):
    """Gradients of rows ``[S, in]``, and of A and B in their own shapes; ``None`` for those that are not needed."""

    rows: Tensor | None
    lora_A: Tensor | None
    lora_B: Tensor | None
