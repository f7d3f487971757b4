"""One decoder block per contender: the same base tensors, the same adapter values, another implementation of LoRA.

Contenders: ``frozen`` (the base alone, forward and input gradient), ``frozen, fused`` (the same with our fusions: what
no LoRA of ours can be faster than), ``full`` (every parameter trains), ``PEFT``, ``ours``, and the peers of
``peers.py`` that are installed. Where the base is not float32, ``PEFT, bf16 adapters`` is PEFT at its best.
"""

import copy
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import peft
import torch
from peers import installed_peers
from torch import Tensor, nn
from transformers import LlamaConfig, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer, Qwen3RotaryEmbedding

from lightning_lora import LoRAConfig, inject
from lightning_lora.layers import LoRALayer

RANK, ALPHA = 8, 16
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
FAMILIES: dict[str, tuple[Any, Any, Any]] = {
    "qwen3": (Qwen3Config, Qwen3DecoderLayer, Qwen3RotaryEmbedding),
    "llama": (LlamaConfig, LlamaDecoderLayer, LlamaRotaryEmbedding),
}


@dataclass(frozen=True)
class Shape:
    """Sizes of one decoder block, of a family of transformers."""

    name: str
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    family: str = "qwen3"

    def config(self, **settings: Any) -> Any:
        return FAMILIES[self.family][0](
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_key_value_heads,
            head_dim=self.head_dim,
            attn_implementation="sdpa",
            **{"num_hidden_layers": 1, **settings},
        )

    def linears(self) -> list[tuple[int, int]]:
        """Return ``(in_features, out_features)`` of the seven linear layers, in the order of ``TARGETS``."""
        hidden, inner = self.hidden_size, self.intermediate_size
        queries, keys = self.num_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        pairs = [(hidden, queries), (hidden, keys), (hidden, keys), (queries, hidden)]
        return pairs + [(hidden, inner), (hidden, inner), (inner, hidden)]


QWEN3_06B = Shape("Qwen3-0.6B", 1024, 3072, 16, 8, 128)
LLAMA_32_1B = Shape("Llama-3.2-1B", 2048, 8192, 32, 8, 64, "llama")
SMOLLM2_135M = Shape("SmolLM2-135M", 576, 1536, 9, 3, 64, "llama")
SMALL = Shape("h=512", 512, 1536, 8, 4, 64)
TINY = Shape("tiny", 32, 64, 4, 2, 8)
TINY_LLAMA = Shape("tiny Llama", 32, 64, 4, 2, 8, "llama")


@dataclass(frozen=True)
class Adapter:
    """What is put into every linear layer of a block."""

    r: int = RANK
    dropout: float = 0.0

    @property
    def alpha(self) -> int:
        return 2 * self.r


@dataclass
class Work:
    """A contender's block with what it computes on."""

    block: nn.Module
    x: Tensor  # [batch, T, hidden_size]
    grad: Tensor  # [batch, T, hidden_size]
    rotary: tuple[Tensor, Tensor]

    def forward(self) -> Tensor:
        return self.block(self.x, position_embeddings=self.rotary)

    def step(self) -> Tensor:
        """Run forward and backward; gradients are dropped first. Returns the output."""
        self.clear()
        output = self.forward()
        output.backward(self.grad)
        return output

    def clear(self) -> None:
        self.x.grad = None
        for parameter in self.block.parameters():
            parameter.grad = None


def frozen(block: nn.Module, adapter: Adapter) -> nn.Module:
    return block.requires_grad_(False)


def frozen_fused(block: nn.Module, adapter: Adapter) -> nn.Module:
    """The base through our fused functions, with adapters of rank 0: no parameter trains, no adapter is computed."""
    inject(block, LoRAConfig(r=1, target_modules=TARGETS))
    for layer in block.modules():
        if isinstance(layer, LoRALayer):
            layer.lora_A = nn.Parameter(layer.lora_A.data[:0], requires_grad=False)
            layer.lora_B = nn.Parameter(layer.lora_B.data[:, :0], requires_grad=False)
    return block


def full(block: nn.Module, adapter: Adapter) -> nn.Module:
    return block.requires_grad_(True)


def with_peft(block: nn.Module, adapter: Adapter, **options: bool) -> nn.Module:
    config = peft.LoraConfig(
        r=adapter.r, lora_alpha=adapter.alpha, lora_dropout=adapter.dropout, target_modules=list(TARGETS)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT on a bare block, which has no config
        return peft.get_peft_model(block, config, **options).base_model.model


def with_peft_bf16(block: nn.Module, adapter: Adapter) -> nn.Module:
    return with_peft(block, adapter, autocast_adapter_dtype=False)


def with_ours(block: nn.Module, adapter: Adapter) -> nn.Module:
    config = LoRAConfig(r=adapter.r, alpha=adapter.alpha, dropout=adapter.dropout, target_modules=TARGETS)
    return inject(block, config)


Builder = Callable[[nn.Module, Adapter], nn.Module]
CONTENDERS: dict[str, Builder] = {
    "frozen": frozen,
    "frozen, fused": frozen_fused,
    "full": full,
    "PEFT": with_peft,
    "ours": with_ours,
}


def builders_of(dtype: torch.dtype, *, peers: bool = True) -> dict[str, Builder]:
    """Return the contenders that exist here for a base of ``dtype``."""
    bf16 = {} if dtype == torch.float32 else {"PEFT, bf16 adapters": with_peft_bf16}
    return {**CONTENDERS, **bf16, **(installed_peers() if peers else {})}


def contenders(
    shape: Shape,
    num_tokens: int,
    adapter: Adapter,
    dtype: torch.dtype = torch.float32,
    *,
    names: Iterable[str] | None = None,
    builders: Mapping[str, Builder] | None = None,
    device: str = "cpu",
    batch: int = 1,
) -> dict[str, Work]:
    """Build the contenders on one set of base tensors, in training mode: those of ``names``, of ``builders``, or all.

    Without dropout, the outputs of all that train adapters are checked to agree.
    """
    torch.manual_seed(0)
    _, layer, rotary_embedding = FAMILIES[shape.family]
    base = layer(shape.config(), layer_idx=0).to(device, dtype)
    x = torch.randn(batch, num_tokens, shape.hidden_size).to(device, dtype)
    grad = torch.randn_like(x)
    positions = torch.arange(num_tokens, device=device)[None]
    rotary = rotary_embedding(shape.config()).to(device)(x, positions)
    chosen = builders_of(dtype) if builders is None else builders
    works = {}
    for name in chosen if names is None else names:
        block = chosen[name](sharing_copy(base), adapter).train()
        fill_adapters(block, shape, adapter)
        works[name] = Work(block, x.clone().requires_grad_(), grad, rotary)
    if adapter.dropout == 0.0:
        check_agreement({name: work for name, work in works.items() if name not in ("frozen", "frozen, fused", "full")})
    return works


def check_agreement(works: dict[str, Work]) -> None:
    """Compare the outputs of contenders that compute the same."""
    tolerance = 1e-4 if all(work.x.dtype == torch.float32 for work in works.values()) else 0.1
    with torch.no_grad():
        outputs = [work.forward() for work in works.values()]
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0], rtol=tolerance, atol=tolerance)


def sharing_copy(base: nn.Module) -> nn.Module:
    """Return a copy with parameters of its own on the storages of ``base``."""
    return copy.deepcopy(base, {id(p): nn.Parameter(p.data) for p in base.parameters()})


def fill_adapters(block: nn.Module, shape: Shape, adapter: Adapter) -> None:
    """Give adapters the values that training would: both factors non-zero, the same for every contender."""
    generator = torch.Generator().manual_seed(1)
    values = {
        name: {
            "a": torch.empty(adapter.r, inputs).normal_(std=0.02, generator=generator),
            "b": torch.empty(outputs, adapter.r).normal_(std=0.02, generator=generator),
        }
        for name, (inputs, outputs) in zip(TARGETS, shape.linears(), strict=True)
    }
    for path, parameter in block.named_parameters():
        factor = next((one for one in ("a", "b") if f"lora_{one}" in path.lower()), None)
        if factor is None or parameter.numel() == 0:
            continue
        layers = [name for name in TARGETS if name in path] or list(TARGETS[:3])  # a joint layer of q, k and v
        parameter.data.copy_(torch.cat([values[name][factor] for name in layers]))
