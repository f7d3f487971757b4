"""The factors of one layer of a PEFT adapter, and how they are written at a larger rank with their scale folded in."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_lora.peft.layout import PREFIX, laid_out

MERGE = "Use merge(model, remove=True) and save the merged model."


@dataclass(frozen=True)
class Factors:
    """The adapter of one layer, with factors that are split into blocks: experts, or groups of a convolution.

    Attributes:
        keys: the names of A and B in the file, without the adapter's name.
        A: [num_blocks, rank of a block, in, ...].
        B: [out, rank of a block, ...], of experts [num_blocks, out, rank].
        scaling: what B A is multiplied by.
        parameters: the names of the module's fused parameters, one of which this adapts; () for a layer.
    """

    keys: tuple[str, str]
    A: Tensor
    B: Tensor
    scaling: float
    parameters: tuple[str, ...] = ()

    @property
    def num_groups(self) -> int:
        return 1 if self.parameters else self.A.shape[0]

    @property
    def rank(self) -> int:
        return self.A.shape[1] * self.num_groups

    @property
    def rank_dim(self) -> int:
        """Which dimension of B is the rank of a block."""
        return 2 if self.parameters else 1

    @property
    def name(self) -> str:
        """The name of the layer in the file."""
        return self.keys[0].partition(".lora_")[0]

    @property
    def module(self) -> str:
        """The name of the adapted module in the base model."""
        return module_of(self.name.removeprefix(PREFIX))


def module_of(name: str) -> str:
    """Return the module that a layer's name in the file is of, or lies in."""
    return name.partition(".base_layer")[0]


def write_factors(
    config: Mapping[str, Any], layers: Mapping[str, Factors], r: int
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the config and the tensors of ``layers`` at rank r, scales folded in.

    Raises:
        ValueError: a convolution's number of groups does not divide r.
    """
    written = with_one_rank(config, layers, r)
    return written, {key: value for factors in layers.values() for key, value in at_rank(factors, r).items()}


def with_one_rank(config: Mapping[str, Any], layers: Mapping[str, Factors], r: int) -> dict[str, Any]:
    """Return the config of ``layers`` at rank r, scales folded in.

    Raises:
        ValueError: a convolution's number of groups does not divide r.
    """
    for factors in layers.values():
        if r % factors.num_groups:
            raise ValueError(
                f"{factors.name!r} is a convolution in {factors.num_groups} groups: rank {factors.rank} cannot be "
                f"padded to the largest rank {r}, which {factors.num_groups} does not divide. {MERGE}"
            )
    return {**config, "r": r, "lora_alpha": r, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}


def at_rank(factors: Factors, r: int) -> dict[str, Tensor]:
    """Return A and B of one layer by their keys, padded with zeros to rank r and with the scale in B."""
    A = _pad(factors.A, 1, r // factors.num_groups)
    B = _pad(folded(factors), factors.rank_dim, r // factors.num_groups)
    B = laid_out("experts_B", [B]) if factors.parameters else B
    return dict(zip(factors.keys, (A.flatten(0, 1).contiguous(), B.contiguous()), strict=True))


def folded(factors: Factors) -> Tensor:
    """Return ``scaling * B``, in B's dtype where that is exact, else in float32."""
    if factors.scaling == 1:
        return factors.B
    B = factors.B.to(torch.promote_types(factors.B.dtype, torch.float32)) * factors.scaling
    narrow = B.to(factors.B.dtype)
    return narrow if torch.equal(narrow.to(B.dtype), B) else B


def _pad(factor: Tensor, dim: int, rank: int) -> Tensor:
    """Append zeros along the dimension in which a factor has its rank."""
    missing = list(factor.shape)
    missing[dim] = rank - factor.shape[dim]
    return torch.cat([factor, factor.new_zeros(missing)], dim=dim) if missing[dim] else factor
