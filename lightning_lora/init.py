"""Starting values of the adapters."""

import hashlib
import math
import os
from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_lora.config import LoRAConfig
from lightning_lora.layers.base import LoRALayer
from lightning_lora.layers.embedding import LoRAEmbedding


def initialize(layers: Mapping[str, LoRALayer], config: LoRAConfig) -> None:
    """Fill every adapter in place: one factor random, the other zero, so that ``B A = 0``.

    Linear layers draw A from U(-1/sqrt(in_features), 1/sqrt(in_features)), embeddings draw B from N(0, 1): the values
    of PEFT. With ``init_rng="peft"`` they are also its very numbers, for the same seed of the default generator.
    """
    for name, layer in layers.items():
        if config.init_rng == "peft":
            values = _as_peft_draws(layer)
        else:
            generator = torch.Generator(device="cpu").manual_seed(_seed(name, config.init_seed))
            values = _draw(layer, generator)
        with torch.no_grad():
            (layer.lora_B if isinstance(layer, LoRAEmbedding) else layer.lora_A).copy_(values)


def _seed(name: str, init_seed: int | None) -> int:
    """Return a 63-bit seed that depends on the adapter's name and the run's seed only."""
    if init_seed is None:
        init_seed = int(os.environ.get("PL_GLOBAL_SEED", 0))  # left there by seed_everything
    digest = hashlib.blake2b(f"{init_seed}:{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _draw(layer: LoRALayer, generator: torch.Generator | None) -> Tensor:
    """Return float32 values on CPU for the random factor. Not by ``nn.init``, which ``empty_init`` turns off."""
    if isinstance(layer, LoRAEmbedding):
        return torch.empty(layer.lora_B.shape, dtype=torch.float32, device="cpu").normal_(generator=generator)
    # the bound of kaiming_uniform_(a=sqrt(5)), in its order of operations, for equal bits
    bound = math.sqrt(3.0) * (math.sqrt(2.0 / (1 + math.sqrt(5) ** 2)) / math.sqrt(layer.lora_A.shape[1]))
    return torch.empty(layer.lora_A.shape, dtype=torch.float32, device="cpu").uniform_(
        -bound, bound, generator=generator
    )


def _as_peft_draws(layer: LoRALayer) -> Tensor:
    """Draw what PEFT draws, also what it throws away: default values of two ``nn.Linear``, or two normal tensors."""
    (r, in_features), (out_features, _) = layer.lora_A.shape, layer.lora_B.shape
    if isinstance(layer, LoRAEmbedding):
        torch.randn(r, in_features, device="cpu")
        torch.randn(out_features, r, device="cpu")
    else:
        torch.empty(r, in_features, device="cpu").uniform_()
        torch.empty(out_features, r, device="cpu").uniform_()
    values = _draw(layer, None)
    weight = layer.base_weight
    if weight.dtype in (torch.bfloat16, torch.float16):
        values = values.to(weight.dtype).float()  # PEFT casts to the base's dtype and back
    return values
