"""Mixtures of experts with adapters on fused 3-D experts: step time and bytes kept for backward, beside PEFT.

``python benchmarks/moe.py``. Contenders: ``frozen``, ``full``, ``PEFT`` (``target_parameters``) and ``ours``, on the
same base tensors. A case is one mixture (router and experts) or a whole model, whose attention stays without adapters.
Timed are forward and backward, and the same with the optimizer: fused AdamW, and ours where the adapters are ours.
"""

import argparse
import copy
import json
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import blocks
import peft
import tables
import torch
from counters import kernels, saved_bytes
from timing import timed
from torch import Tensor, nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from lightning_lora import load_peft

RANK, ALPHA, TOKENS, TOP_K = 8, 16, 256, 4
PARAMETERS = ["experts.gate_up_proj", "experts.down_proj"]


@dataclass(frozen=True)
class Case:
    """A mixture of ``num_experts``, or with ``num_layers`` a whole model of such, in one implementation of experts."""

    name: str
    num_experts: int
    hidden_size: int
    intermediate_size: int
    implementation: str
    num_layers: int = 0

    @property
    def steps(self) -> int:
        """How many make one sample."""
        return 2 if self.num_layers or self.hidden_size > 256 else 10

    def config(self) -> Qwen3MoeConfig:
        config = Qwen3MoeConfig(
            hidden_size=self.hidden_size,
            moe_intermediate_size=self.intermediate_size,
            num_experts=self.num_experts,
            num_experts_per_tok=TOP_K,
            num_hidden_layers=max(1, self.num_layers),
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=self.hidden_size // 4,
            vocab_size=512,
            norm_topk_prob=True,
            attn_implementation="sdpa",
        )
        config._experts_implementation = self.implementation
        return config


IMPLEMENTATIONS = ("grouped_mm", "eager")
CASES = [
    Case(name, *sizes, implementation, num_layers)
    for name, sizes, num_layers, implementations in (
        ("mixture, E=16 h=256 i=96", (16, 256, 96), 0, IMPLEMENTATIONS),
        ("mixture, E=16 h=512 i=384", (16, 512, 384), 0, IMPLEMENTATIONS),
        ("mixture, E=8 h=1024 i=768", (8, 1024, 768), 0, IMPLEMENTATIONS),
        ("mixture, E=8 h=2048 i=768", (8, 2048, 768), 0, IMPLEMENTATIONS[:1]),  # as Qwen3-30B-A3B's experts; large
        ("4 layers, E=16 h=256 i=96", (16, 256, 96), 4, IMPLEMENTATIONS),
        ("2 layers, E=32 h=256 i=96", (32, 256, 96), 2, IMPLEMENTATIONS),
    )
    for implementation in implementations
]


class Model(nn.Module):
    """A whole model that is called with hidden states, in place of token ids, and returns hidden states."""

    def __init__(self, config: Qwen3MoeConfig) -> None:
        super().__init__()
        self.inner = Qwen3MoeForCausalLM(config).model
        self.inner.embed_tokens = None

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(inputs_embeds=x, use_cache=False).last_hidden_state


class Work(blocks.Work):
    """A contender with what it computes on; there are no positions."""

    def forward(self) -> Tensor:
        return self.block(self.x)


def contenders(case: Case) -> dict[str, Work]:
    """Build every contender on one set of base tensors, in training mode; PEFT's and our outputs must agree."""
    torch.manual_seed(0)
    base = Model(case.config()) if case.num_layers else Qwen3MoeSparseMoeBlock(case.config())
    for parameter in base.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.02)
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as directory:
        warnings.simplefilter("ignore")  # PEFT on a bare block, which has no config
        theirs = _with_peft(_sharing_copy(base))
        theirs.save_pretrained(directory)
        models = {
            "frozen": _sharing_copy(base).requires_grad_(False),
            "full": _sharing_copy(base).requires_grad_(True),
            "PEFT": theirs.base_model.model,
            "ours": load_peft(_sharing_copy(base), directory),
        }
    x = torch.randn(1, TOKENS, case.hidden_size)
    grad = torch.randn_like(x)
    works = {name: Work(block.train(), x.clone().requires_grad_(), grad, ()) for name, block in models.items()}
    torch.testing.assert_close(works["ours"].forward(), works["PEFT"].forward(), rtol=1e-4, atol=1e-4)
    return works


def _with_peft(block: nn.Module) -> peft.PeftModel:
    """Return the block with adapters that hold what training would leave: both factors non-zero."""
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=[], target_parameters=PARAMETERS)
    model = peft.get_peft_model(block, config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.02)
    return model


def _sharing_copy(base: nn.Module) -> nn.Module:
    """Return a copy with parameters of its own on the storages of ``base``."""
    return copy.deepcopy(base, {id(p): nn.Parameter(p.data) for p in base.parameters()})


def measure(rounds: int, quick: bool = False) -> list[dict[str, Any]]:
    """Time and count every case; with ``quick`` the first one alone."""
    return [_measured(case, rounds) for case in (CASES[:1] if quick else CASES)]


def _measured(case: Case, rounds: int) -> dict[str, Any]:
    works = contenders(case)
    counted = {
        "saved_bytes": {name: saved_bytes(work) for name, work in works.items()},
        "kernels": {name: kernels(work) for name, work in works.items()},
    }
    steps = timed({name: work.step for name, work in works.items()}, rounds, steps=case.steps)
    trained = {name: _with_optimizer(name, work) for name, work in works.items()}
    whole = timed(trained, rounds, steps=case.steps)
    return {"case": case.name, "implementation": case.implementation, **counted, **steps, "with_optimizer": whole}


def _with_optimizer(name: str, work: Work) -> Callable[[], object]:
    """Return a step that ends with the optimizer's, as small as can be: the values hardly move."""
    trained = [parameter for parameter in work.block.parameters() if parameter.requires_grad]
    if not trained:
        return work.step
    optimizer = torch.optim.AdamW(trained, lr=1e-9, fused=True)

    def run() -> None:
        work.step()
        optimizer.step()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=21, help="rounds of every timing (at least 15 for a result)")
    parser.add_argument("--output", type=Path, help="a JSON file to write the results to")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = measure(args.rounds)
    tables.show("moe", results)
    if args.output is not None:
        args.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
