"""One decoder block per contender: the same base tensors, the same adapter values, another implementation of LoRA.

Contenders: ``frozen`` (the base alone, forward and input gradient: what no LoRA can be faster than), ``full`` (every
parameter trains), ``PEFT``, and ``ours``. Where the base is not float32, ``PEFT, bf16 adapters`` is PEFT at its best.
"""

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import peft
import torch
from torch import Tensor, nn
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer, Qwen3RotaryEmbedding

from lightning_lora import LoRAConfig, inject

RANK, ALPHA = 8, 16
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Shape:
    """Sizes of one Qwen3 decoder block."""

    name: str
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_key_value_heads: int
    head_dim: int

    def config(self) -> Qwen3Config:
        return Qwen3Config(
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_key_value_heads,
            head_dim=self.head_dim,
            num_hidden_layers=1,
            attn_implementation="sdpa",
        )


QWEN3_06B = Shape("Qwen3-0.6B", 1024, 3072, 16, 8, 128)
SMALL = Shape("h=512", 512, 1536, 8, 4, 64)


@dataclass
class Work:
    """A contender's block with what it computes on."""

    block: nn.Module
    x: Tensor  # [1, T, hidden_size]
    grad: Tensor  # [1, T, hidden_size]
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


def frozen(block: nn.Module, dropout: float) -> nn.Module:
    return block.requires_grad_(False)


def full(block: nn.Module, dropout: float) -> nn.Module:
    return block.requires_grad_(True)


def with_peft(block: nn.Module, dropout: float, **options: bool) -> nn.Module:
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=dropout, target_modules=list(TARGETS))
    return peft.get_peft_model(block, config, **options).base_model.model


def with_peft_bf16(block: nn.Module, dropout: float) -> nn.Module:
    return with_peft(block, dropout, autocast_adapter_dtype=False)


def with_ours(block: nn.Module, dropout: float) -> nn.Module:
    return inject(block, LoRAConfig(r=RANK, alpha=ALPHA, dropout=dropout, target_modules=TARGETS))


CONTENDERS: dict[str, Callable[[nn.Module, float], nn.Module]] = {
    "frozen": frozen,
    "full": full,
    "PEFT": with_peft,
    "ours": with_ours,
}
BF16_CONTENDERS = {**CONTENDERS, "PEFT, bf16 adapters": with_peft_bf16}


def contenders(shape: Shape, num_tokens: int, dropout: float, dtype: torch.dtype = torch.float32) -> dict[str, Work]:
    """Build every contender on one set of base tensors, in training mode.

    Without dropout, the outputs of PEFT and ours are checked to agree.
    """
    torch.manual_seed(0)
    base = Qwen3DecoderLayer(shape.config(), layer_idx=0).to(dtype)
    x = torch.randn(1, num_tokens, shape.hidden_size).to(dtype)
    grad = torch.randn_like(x)
    rotary = Qwen3RotaryEmbedding(shape.config())(x, torch.arange(num_tokens)[None])
    works = {}
    for name, build in (CONTENDERS if dtype == torch.float32 else BF16_CONTENDERS).items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT on a bare block, which has no config
            block = build(_sharing_copy(base), dropout).train()
        _fill_adapters(block)
        works[name] = Work(block, x.clone().requires_grad_(), grad, rotary)
    if dropout == 0.0:
        expected = works["PEFT"].forward()
        tolerance = 1e-4 if dtype == torch.float32 else 0.1
        torch.testing.assert_close(works["ours"].forward(), expected, rtol=tolerance, atol=tolerance)
    return works


def _sharing_copy(base: nn.Module) -> nn.Module:
    """Return a copy with parameters of its own on the storages of ``base``."""
    return copy.deepcopy(base, {id(p): nn.Parameter(p.data) for p in base.parameters()})


def _fill_adapters(block: nn.Module) -> None:
    """Give the adapters the values that training would: both factors non-zero, the same for every contender."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in block.named_parameters():
        if "lora_" in name:
            values = torch.empty(parameter.shape).normal_(std=0.02, generator=generator)
            parameter.data.copy_(values)
