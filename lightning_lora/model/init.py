"""Draw the starting values of the adapters: a function for each value of ``LoRAConfig(init=...)``.

To add one, write a function that returns A and B (``None`` leaves zeros) and decorate it with :func:`register_init`.
"""

import hashlib
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_lora.config import INITS, LoRAConfig
from lightning_lora.layers.adalora import AdaLoRALinear
from lightning_lora.layers.attention import LoRAMultiheadAttention
from lightning_lora.layers.base import LoRALayer, Pair
from lightning_lora.layers.bias import Biased
from lightning_lora.layers.parameters import LoRAParameters
from lightning_lora.model.layer_plan import LayerPlan

Generator = torch.Generator | None  # None is the default generator
Values = tuple[Tensor | None, Tensor | None]
Init = Callable[
    [LoRALayer, Pair, str, Generator], Values
]  # the str is the word that was given, such as "pissa_niter_4"

_FUNCTIONS: dict[str, Init] = {}


def register_init(word: str, *, from_base: bool = False) -> Callable[[Init], Init]:
    """Let a function draw the values of ``LoRAConfig(init=word)``, where a capital N stands for a number.

    Args:
        from_base: the start is a part of the base weight, which is subtracted in the product: linear layers alone.
    """

    def register(function: Init) -> Init:
        INITS[word] = from_base
        _FUNCTIONS[word] = function
        return function

    return register


@torch.no_grad()
def initialize(layers: Mapping[str, LoRALayer], plans: Mapping[str, Sequence[LayerPlan]], config: LoRAConfig) -> None:
    """Fill every pair in place, so that the adapted model starts as its base: the values of PEFT.

    With ``init_rng="peft"`` they are also its very numbers, for the same seed of the default generator. PiSSA and OLoRA
    draw nothing; the fast PiSSA does.

    Args:
        layers: the adapted layers, by name.
        plans: what was decided for the pairs of each.
    """
    for name, layer in layers.items():
        if isinstance(layer, LoRAMultiheadAttention) and config.init_rng == "peft":
            # PEFT draws the values of the output projection twice, before and after those of the input projection
            projection = layers.get(f"{name}.out_proj")
            if projection is not None:
                _initialize_pair(projection, projection.pairs()[""], f"{name}.out_proj", config)
        pairs = layer.pairs()
        for one in plans[name]:
            _initialize_pair(layer, pairs[one.part], one.name, config)
        layer.start()


def _initialize_pair(layer: LoRALayer, pair: Pair, name: str, config: LoRAConfig) -> None:
    like_peft = config.init_rng == "peft"
    generator = None if like_peft else torch.Generator(device="cpu").manual_seed(seed_of(name, config.init_seed))
    if like_peft:
        bias = [layer.lora_bias] if isinstance(layer, Biased) else []
        own = [layer.lora_E, pair.B, pair.A.new_empty(1)] if isinstance(layer, AdaLoRALinear) else [pair.B, *bias]
        _burn([pair.A, *own], normal=not layer.uses_init)
    not_init = _adalora if isinstance(layer, AdaLoRALinear) else _embedding
    function = _function(config.init) if layer.uses_init else not_init
    for parameter, value in zip((pair.A, pair.B), function(layer, pair, config.init, generator), strict=True):
        if value is not None:
            value = _as_peft_rounds(value, layer) if like_peft else value
            if value is not parameter:
                parameter.copy_(value)


def _function(init: str) -> Init:
    return next(function for word, function in _FUNCTIONS.items() if re.fullmatch(word.replace("N", r"\d+"), init))


@register_init("kaiming")
def _kaiming(layer: LoRALayer, pair: Pair, _: str, generator: Generator) -> Values:
    """Draw A from U(-1/sqrt(in), 1/sqrt(in)), in A itself if it is float32 on CPU.

    Not by ``nn.init``, which ``empty_init`` turns off.
    """
    A = pair.A
    fan_in = A.shape[-1] if isinstance(layer, LoRAParameters) else math.prod(A.shape[1:])
    # the bound of kaiming_uniform_(a=sqrt(5)), in its order of operations, for equal bits
    bound = math.sqrt(3.0) * (math.sqrt(2.0 / (1 + math.sqrt(5) ** 2)) / math.sqrt(fan_in))
    is_one = A.dtype == torch.float32 and A.device.type == "cpu" and A.is_contiguous()
    values = A if is_one else torch.empty(A.shape, dtype=torch.float32, device="cpu")
    return values.uniform_(-bound, bound, generator=generator), None


@register_init("gaussian")
def _gaussian(_: LoRALayer, pair: Pair, __: str, generator: Generator) -> Values:
    """Draw A from N(0, 1/r^2)."""
    return _normal(pair.A.shape, 1 / pair.r, generator), None


@register_init("orthogonal")
def _orthogonal(_: LoRALayer, pair: Pair, __: str, generator: Generator) -> Values:
    """Draw A and B whose product is zero: halves of one random orthogonal matrix, spread by random matrices."""
    r, half = pair.r, pair.r // 2
    q, _r = torch.linalg.qr(torch.randn(r, r, generator=generator, device="cpu"))
    A = torch.randn(pair.A.shape[1], half, generator=generator, device="cpu").mm(q[0::2]).t() / 10.0
    B = torch.randn(half, pair.B.shape[0], generator=generator, device="cpu").t().mm(q[1::2]) / 10.0
    return A, B


@register_init("pissa", from_base=True)
def _pissa(layer: LoRALayer, pair: Pair, _: str, __: Generator) -> Values:
    """Take the largest singular values of W: ``scaling * B A`` is that part of it (Meng et al. 2024, sec. 3)."""
    left, values, right = torch.linalg.svd(_base_matrix(layer), full_matrices=False)
    return _principal(left[:, : pair.r], values[: pair.r], right[: pair.r], pair)


@register_init("pissa_niter_N", from_base=True)
def _fast_pissa(layer: LoRALayer, pair: Pair, init: str, generator: Generator) -> Values:
    """Take an estimate of the largest singular values, by N power iterations."""
    with torch.random.fork_rng(devices=[], enabled=generator is not None):
        if generator is not None:
            torch.manual_seed(generator.initial_seed())
        left, values, right = torch.svd_lowrank(_base_matrix(layer), pair.r, niter=int(init.rpartition("_")[2]))
    return _principal(left, values, right.t(), pair)


@register_init("olora", from_base=True)
def _olora(layer: LoRALayer, pair: Pair, _: str, __: Generator) -> Values:
    """Take the first columns of the QR decomposition of W: ``B A`` is that part of it (Buyukakyuz 2024)."""
    q, upper = torch.linalg.qr(_base_matrix(layer))
    return upper[: pair.r], q[:, : pair.r]


def _embedding(_: LoRALayer, pair: Pair, __: str, generator: Generator) -> Values:
    """Draw B from N(0, 1) and leave A at zero, as PEFT does for embeddings, whatever the init."""
    return None, _normal(pair.B.shape, 1.0, generator)


def _adalora(_: LoRALayer, pair: Pair, __: str, generator: Generator) -> Values:
    """Draw A and B from N(0, 0.02^2); E is zero."""
    return _normal(pair.A.shape, 0.02, generator), _normal(pair.B.shape, 0.02, generator)


def _base_matrix(layer: LoRALayer) -> Tensor:
    """Return the base weight as float32, ``[out, in]``."""
    return layer.as_matrix(layer.base_weight.detach().float())


def _principal(left: Tensor, values: Tensor, right: Tensor, pair: Pair) -> Values:
    root = torch.diag(torch.sqrt(values / pair.scaling))
    return root @ right, left @ root


def seed_of(name: str, init_seed: int | None) -> int:
    """Return a 63-bit seed that depends on the adapter's name and the run's seed only."""
    if init_seed is None:
        init_seed = int(os.environ.get("PL_GLOBAL_SEED", 0))  # left there by seed_everything
    digest = hashlib.blake2b(f"{init_seed}:{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _normal(shape: Sequence[int], std: float, generator: torch.Generator | None) -> Tensor:
    return torch.empty(tuple(shape), dtype=torch.float32, device="cpu").normal_(0.0, std, generator=generator)


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
