"""Starting values of the adapters."""

import hashlib
import math
import os
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_lora.config import LoRAConfig
from lightning_lora.layers.attention import LoRAMultiheadAttention
from lightning_lora.layers.base import LoRALayer, Pair
from lightning_lora.layers.bias import Biased
from lightning_lora.layers.dora import DoRA
from lightning_lora.layers.embedding import LoRAEmbedding
from lightning_lora.layers.linear import LoRAConv1D
from lightning_lora.layers.parameters import LoRAParameters
from lightning_lora.layers.residual import ResidualLinear
from lightning_lora.megatron.layers import LoRAMegatronLinear


@torch.no_grad()
def initialize(layers: Mapping[str, LoRALayer], config: LoRAConfig) -> None:
    """Fill every pair in place, so that the adapted model starts as its base: the values of PEFT.

    With ``init_rng="peft"`` they are also its very numbers, for the same seed of the default generator. PiSSA and OLoRA
    draw nothing; the fast PiSSA does.
    """
    for name, layer in layers.items():
        if isinstance(layer, LoRAMultiheadAttention) and config.init_rng == "peft":
            # PEFT draws the values of the output projection twice, before and after those of the input projection
            projection = layers[f"{name}.out_proj"]
            _initialize_pair(projection, projection.pairs()[""], f"{name}.out_proj", config)
        for local, pair in layer.pairs().items():
            # the same values for a model of Megatron-core's as for Hugging Face's
            names = layer.lora_names if isinstance(layer, LoRAMegatronLinear) else {}
            full_name = names.get(local) or ".".join(part for part in (name, local) if part)
            _initialize_pair(layer, pair, full_name, config)
        if isinstance(layer, ResidualLinear):
            layer.keep_start()
        if isinstance(layer, DoRA):
            layer.start_magnitude()


def _initialize_pair(layer: LoRALayer, pair: Pair, name: str, config: LoRAConfig) -> None:
    like_peft = config.init_rng == "peft"
    generator = None if like_peft else torch.Generator(device="cpu").manual_seed(_seed(name, config.init_seed))
    if like_peft:
        bias = [layer.lora_bias] if isinstance(layer, Biased) else []
        _burn([pair.A, pair.B, *bias], normal=isinstance(layer, LoRAEmbedding))
    if isinstance(layer, LoRAEmbedding):
        values: Sequence[Tensor | None] = (None, _normal(pair.B.shape, 1.0, generator))
    elif isinstance(layer, ResidualLinear):
        values = _from_base(layer, pair, name, config.init, generator)
    elif config.init == "orthogonal":
        values = _orthogonal(pair, generator)
    elif config.init == "gaussian":
        values = (_normal(pair.A.shape, 1 / pair.r, generator), None)
    else:
        fan_in = pair.A.shape[-1] if isinstance(layer, LoRAParameters) else math.prod(pair.A.shape[1:])
        values = (_kaiming(pair.A, fan_in, generator), None)
    for parameter, value in zip((pair.A, pair.B), values, strict=True):
        if value is not None:
            value = _as_peft_rounds(value, layer) if like_peft else value
            if value is not parameter:
                parameter.copy_(value)


def _seed(name: str, init_seed: int | None) -> int:
    """Return a 63-bit seed that depends on the adapter's name and the run's seed only."""
    if init_seed is None:
        init_seed = int(os.environ.get("PL_GLOBAL_SEED", 0))  # left there by seed_everything
    digest = hashlib.blake2b(f"{init_seed}:{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _normal(shape: Sequence[int], std: float, generator: torch.Generator | None) -> Tensor:
    return torch.empty(tuple(shape), dtype=torch.float32, device="cpu").normal_(0.0, std, generator=generator)


def _kaiming(A: Tensor, fan_in: int, generator: torch.Generator | None) -> Tensor:
    """Return float32 values on CPU for A, in A itself if it is. Not by ``nn.init``, which ``empty_init`` turns off."""
    # the bound of kaiming_uniform_(a=sqrt(5)), in its order of operations, for equal bits
    bound = math.sqrt(3.0) * (math.sqrt(2.0 / (1 + math.sqrt(5) ** 2)) / math.sqrt(fan_in))
    is_one = A.dtype == torch.float32 and A.device.type == "cpu" and A.is_contiguous()
    values = A if is_one else torch.empty(A.shape, dtype=torch.float32, device="cpu")
    return values.uniform_(-bound, bound, generator=generator)


def _orthogonal(pair: Pair, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Return A and B whose product is zero: halves of one random orthogonal matrix, spread by random matrices."""
    r, half = pair.r, pair.r // 2
    q, _ = torch.linalg.qr(torch.randn(r, r, generator=generator, device="cpu"))
    A = torch.randn(pair.A.shape[1], half, generator=generator, device="cpu").mm(q[0::2]).t() / 10.0
    B = torch.randn(half, pair.B.shape[0], generator=generator, device="cpu").t().mm(q[1::2]) / 10.0
    return A, B


def _from_base(
    layer: ResidualLinear, pair: Pair, name: str, init: str, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Return A and B with ``scaling * B A`` the part of W that PiSSA takes (sec. 3), or ``B A`` the one of OLoRA."""
    stored = layer.base_weight.detach().float()
    if not torch.isfinite(stored).all():
        raise ValueError(
            f"init={init!r} starts from the weight of {name!r}, which holds NaN or infinity: load another base, or "
            "take init='kaiming'"
        )
    weight = stored.t() if isinstance(layer, LoRAConv1D) else stored  # [out, in]
    if init == "olora":
        q, upper = torch.linalg.qr(weight)
        return upper[: pair.r], q[:, : pair.r]
    if init == "pissa":
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        left, values, right = left[:, : pair.r], values[: pair.r], right[: pair.r]
    else:
        with torch.random.fork_rng(devices=[], enabled=generator is not None):
            if generator is not None:
                torch.manual_seed(generator.initial_seed())
            left, values, right = torch.svd_lowrank(weight, pair.r, niter=int(init.rpartition("_")[2]))
            right = right.t()
    root = torch.diag(torch.sqrt(values / pair.scaling))
    return root @ right, left @ root


def _burn(parameters: Sequence[Tensor], normal: bool = False) -> None:
    """Draw what PEFT draws and throws away: default values of two layers, or two normal tensors."""
    for factor in parameters:
        values = torch.empty(factor.shape, device="cpu")
        if normal:
            values.normal_()
        else:
            values.uniform_()


def _as_peft_rounds(values: Tensor, layer: LoRALayer) -> Tensor:
    """Cast to the base's dtype and back, as PEFT does."""
    weight = next((tensor for tensor in layer.base_tensors().values() if tensor is not None), None)
    if isinstance(weight, nn.Parameter) and weight.dtype in (torch.bfloat16, torch.float16):
        return values.to(weight.dtype).float()
    return values
