"""What products of all experts take and return: which rows go to which expert, weights, gradients."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lora.ops.packed_stack import PackedStack


class Groups(NamedTuple):
    """``S = T * k`` rows, each a token for one of its ``k`` experts, sorted by expert.

    Attributes:
        order: ``[S]``, the place in the routing, ``token * k + choice``, of each row.
        places: ``[T, k]``, the row of each place in the routing.
        ends: ``[num_experts]`` int32, where each expert's rows end.
        counts: rows of each expert; ``None`` leaves the numbers on the device, where grouped products read them.
    """

    order: Tensor
    places: Tensor
    ends: Tensor
    counts: tuple[int, ...] | None

    @classmethod
    def of(cls, index: Tensor, num_experts: int, *, on_host: bool) -> "Groups":
        """Sort a routing ``[T, k]`` of experts; ``on_host`` waits for the device and reads the numbers of rows."""
        experts, order = index.reshape(-1).sort(stable=True)
        places = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        ends = torch.searchsorted(experts, torch.arange(num_experts, device=order.device), right=True, out_int32=True)
        counts = None
        if on_host:
            last = ends.tolist()
            counts = tuple(end - start for start, end in zip([0, *last], last, strict=False))
        return cls(order, places.view_as(index), ends, counts)

    def dispatch(self, tokens: Tensor) -> Tensor:
        """Return each row's token: ``[T, n]`` as ``[S, n]``."""
        return tokens.index_select(0, self.tokens())

    def tokens(self) -> Tensor:
        """Return each row's place among the tokens, ``[S]``."""
        return self.order // self.places.shape[1]

    def combine(self, rows: Tensor) -> Tensor:
        """Return each token's sum over its rows, the transpose of :meth:`dispatch`: ``[S, n]`` as ``[T, n]``."""
        return F.embedding_bag(self.places, rows, mode="sum")  # gathers and adds in one kernel

    def experts(self) -> Tensor:
        """Return each row's expert, ``[S]``."""
        rows = torch.arange(len(self.order), device=self.ends.device, dtype=self.ends.dtype)
        return torch.searchsorted(self.ends, rows, right=True)


class ExpertWeights(NamedTuple):
    """The tensors of one linear layer per expert; there may be no adapter, and no bias.

    Attributes:
        weight: ``[experts, out, in]``, of any strides, or packed.
        bias: ``[experts, out]``.
        lora_A: ``[experts, r, in]``.
        lora_B: ``[experts, out, r]``.
        scaling: factor of the adapter's term.
    """

    weight: Tensor | PackedStack
    bias: Tensor | None
    lora_A: Tensor | None
    lora_B: Tensor | None
    scaling: float


class Gradients(NamedTuple):
    """Gradients of rows ``[S, in]``, and of A and B in their own shapes; ``None`` for those that are not needed."""

    rows: Tensor | None
    lora_A: Tensor | None
    lora_B: Tensor | None
