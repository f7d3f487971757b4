"""Decoding token by token with a cache: the base alone, the adapters beside it, and the adapters merged into it."""

import warnings
from typing import Any

import peft
import torch
from blocks import ALPHA, RANK, TARGETS, sharing_copy
from timing import timed
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_lora import LoRAConfig, inject, merge

PROMPT, NEW_TOKENS = 16, 24
SIZES = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "vocab_size": 4096}
QUICK = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 64}


def measure(rounds: int, quick: bool = False) -> dict[str, Any]:
    new_tokens = 3 if quick else NEW_TOKENS
    models = contenders(QUICK if quick else SIZES)
    prompt = torch.arange(PROMPT)[None]
    with torch.no_grad():
        logits = {name: model(prompt).logits for name, model in models.items()}
    for name in ("ours, merged", "PEFT", "PEFT, merged"):
        torch.testing.assert_close(logits[name], logits["ours"], rtol=1e-3, atol=1e-3)

    def decode(model: Any) -> None:
        model.generate(input_ids=prompt, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False)

    works = {name: lambda model=model: decode(model) for name, model in models.items()}
    found = timed(works, rounds)
    return {"model": dict(QUICK if quick else SIZES), "prompt": PROMPT, "new_tokens": new_tokens, **found}


def contenders(sizes: dict[str, int]) -> dict[str, nn.Module]:
    """Build a base, and what it becomes with one and the same adapter.

    ``frozen`` and ``base`` are the same thing twice: what the ratio of two equal models is on this machine.
    """
    config = LlamaConfig(**sizes, num_attention_heads=8, num_key_value_heads=4, attn_implementation="sdpa")
    config.eos_token_id = config.pad_token_id = None
    torch.manual_seed(0)
    base = LlamaForCausalLM(config).eval()

    def with_peft() -> Any:
        targets = {"target_modules": list(TARGETS), "task_type": "CAUSAL_LM"}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _filled(peft.get_peft_model(_own_copy(base), peft.LoraConfig(r=RANK, lora_alpha=ALPHA, **targets)))

    def with_ours() -> nn.Module:
        return _filled(inject(_own_copy(base), LoRAConfig(r=RANK, alpha=ALPHA, target_modules=TARGETS)))

    merged = with_ours()
    merge(merged)
    models = {
        "frozen": base,
        "base": sharing_copy(base),
        "ours, merged": merged,
        "ours, merged, removed": merge(with_ours(), remove=True),
        "ours": with_ours(),
        "PEFT": with_peft(),
        "PEFT, merged": with_peft().merge_and_unload(),
    }
    return {name: model.eval().requires_grad_(False) for name, model in models.items()}


def _own_copy(base: nn.Module) -> nn.Module:
    model = sharing_copy(base)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def _filled(model: nn.Module) -> nn.Module:
    """Give the adapters values; both libraries have them in one order."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.02, generator=generator)
    return model
