"""aten kernels of a step: of the linear layers of a Llama-like block, and of whole blocks of other families."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import peft
import torch
from blocks import ALPHA, RANK, TARGETS
from counters import KernelCount
from torch import Tensor, nn
from transformers import BertConfig, GPT2Config, LlamaConfig
from transformers.models.bert.modeling_bert import BertLayer
from transformers.models.gpt2.modeling_gpt2 import GPT2Block
from transformers.models.llama.modeling_llama import LlamaMLP

from lightning_lora import LoRAConfig, inject

HIDDEN, KEYS, INNER, TOKENS = 64, 32, 128, 16


class LlamaLinears(nn.Module):
    """The seven linear layers and the activation of a Llama-like block, each used as there; no norms, no attention."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.o_proj = (nn.Linear(HIDDEN, HIDDEN, bias=False) for _ in range(2))
        self.k_proj, self.v_proj = (nn.Linear(HIDDEN, KEYS, bias=False) for _ in range(2))
        self.mlp = LlamaMLP(LlamaConfig(hidden_size=HIDDEN, intermediate_size=INNER, num_attention_heads=4))

    def forward(self, x: Tensor, attended: Tensor, between: Tensor) -> tuple[Tensor, ...]:
        return self.q_proj(x), self.k_proj(x), self.v_proj(x), self.o_proj(attended), self.mlp(between)


class UnknownLinears(LlamaLinears):
    """The same layers, called so that nothing shows what they have in common."""

    def forward(self, x: Tensor, attended: Tensor, between: Tensor) -> tuple[Tensor, ...]:
        q, k, v = (getattr(self, f"{name}_proj")(x) for name in "qkv")
        h = nn.functional.silu(self.mlp.gate_proj(between)) * self.mlp.up_proj(between)
        return q, k, v, self.o_proj(attended), self.mlp.down_proj(h)


def _gpt2() -> nn.Module:
    config = GPT2Config(n_embd=HIDDEN, n_head=4, attn_pdrop=0.0, resid_pdrop=0.0, attn_implementation="sdpa")
    return GPT2Block(config, 0)


def _bert() -> nn.Module:
    sizes = {"hidden_size": HIDDEN, "num_attention_heads": 4, "intermediate_size": INNER}
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertLayer(BertConfig(**sizes, **no_dropout, attn_implementation="sdpa"))


# name: how it is built, its layers, how many inputs it takes
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...], int]] = {
    "linears of a Llama-like block": (LlamaLinears, TARGETS, 3),
    "the same, called one by one": (UnknownLinears, TARGETS, 3),
    "whole GPT-2 block": (_gpt2, ("c_attn", "c_proj", "c_fc"), 1),
    "whole BERT layer": (_bert, ("query", "key", "value", "dense"), 1),
}


def measure(rounds: int, quick: bool = False) -> dict[str, dict[str, int]]:
    """Count once, in any mode: figures repeat and do not depend on sizes."""
    return {name: _counts(*case) for name, case in CASES.items()}


def _counts(build: Callable[[], nn.Module], targets: tuple[str, ...], num_inputs: int) -> dict[str, int]:
    base = build()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT on a bare block, and on layers stored transposed
        theirs = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(targets))
        blocks = {
            "frozen": copy.deepcopy(base).requires_grad_(False),
            "full": copy.deepcopy(base),
            "PEFT": peft.get_peft_model(copy.deepcopy(base), theirs).base_model.model,
            "ours": inject(copy.deepcopy(base), LoRAConfig(r=RANK, alpha=ALPHA, target_modules=targets)),
        }
    return {name: _count(block.train(), num_inputs) for name, block in blocks.items()}


def _count(block: nn.Module, num_inputs: int) -> int:
    inputs = [torch.ones(1, TOKENS, HIDDEN, requires_grad=True) for _ in range(num_inputs)]
    wanted: list[Any] = [*inputs, *(p for p in block.parameters() if p.requires_grad)]

    def step() -> int:
        with KernelCount() as count:
            outputs = block(*inputs)
            outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
            torch.autograd.grad(outputs, wanted, [torch.ones_like(y) for y in outputs])
        return count.total - len(outputs)  # less the ones

    step()  # what is made once is no part of a step
    return step()
