"""One product of all experts: the tensors that it multiplies by, and what backward finds of them."""

from typing import NamedTuple

from torch import Tensor


class Stack(NamedTuple):
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
    """What backward finds: of rows ``[S, in]``, of the factors in their own shapes; ``None`` for what is not needed."""

    rows: Tensor | None
    lora_A: Tensor | None
    lora_B: Tensor | None
