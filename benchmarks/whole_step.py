"""A whole step of the quickstart: forward, loss, backward, clipping and optimizer of a SmolLM2-135M shape."""

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ours
import peft
import torch
from blocks import ALPHA, RANK, TARGETS, sharing_copy
from timing import timed
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_lora import LoRAConfig, inject

LR, MAX_NORM = 1e-4, 1.0
# tokens of prompt and gloss of the first 16 pairs that the quickstart trains on, as its tokenizer counts them
LENGTHS = (
    *((8, 8), (9, 13), (10, 9), (9, 13), (9, 9), (8, 19), (11, 8), (10, 10)),
    *((9, 14), (8, 10), (7, 10), (8, 15), (7, 6), (9, 16), (8, 15), (7, 12)),
)
Batch = dict[str, Tensor]  # input_ids, attention_mask and labels, [16, longest] each


def model_config(quick: bool = False) -> LlamaConfig:
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 128}
    smollm2 = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "vocab_size": 49152}
    heads = {"num_attention_heads": 4 if quick else 9, "num_key_value_heads": 2 if quick else 3}
    return LlamaConfig(**(small if quick else smollm2), **heads, tie_word_embeddings=True, attn_implementation="sdpa")


def base_of(config: LlamaConfig) -> nn.Module:
    torch.manual_seed(0)
    return LlamaForCausalLM(config).train()


def batch_like_quickstart(vocab_size: int) -> Batch:
    """Return a batch of random tokens in the quickstart's lengths; only the glosses are learned."""
    generator = torch.Generator().manual_seed(0)
    longest = max(prompt + gloss for prompt, gloss in LENGTHS)
    ids = torch.randint(3, vocab_size, (len(LENGTHS), longest), generator=generator)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, ours.IGNORED)
    for row, (prompt, gloss) in enumerate(LENGTHS):
        mask[row, : prompt + gloss] = 1
        labels[row, prompt : prompt + gloss] = ids[row, prompt : prompt + gloss]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@dataclass
class Contender:
    """A model with its loss and its optimizer; ``None`` for a base of which nothing trains."""

    model: nn.Module
    loss: Callable[[nn.Module, Batch], Tensor]
    stepper: ours.Stepper | None
    batch: Batch

    def step(self) -> float:
        """Run one step. Returns the loss."""
        if self.stepper is not None:
            self.stepper.optimizer.zero_grad()
        loss = self.loss(self.model, self.batch)
        loss.backward()
        if self.stepper is not None:
            self.stepper.clip_and_step()
        return float(loss.detach())

    def states(self) -> list[dict[str, Any]]:
        return [] if self.stepper is None else list(self.stepper.optimizer.state.values())


def own_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The model's own: logits of all positions."""
    return model(**batch, use_cache=False).loss


def hidden_loss(loss: Callable[[Any, Tensor, Tensor], Tensor]) -> Callable[[nn.Module, Batch], Tensor]:
    """Return a loss of what the output head is given, of a model that may be inside PEFT's."""

    def of_model(model: nn.Module, batch: Batch) -> Tensor:
        inner: Any = model.get_base_model() if isinstance(model, peft.PeftModel) else model
        embedded = inner.get_input_embeddings()(batch["input_ids"])
        if not any(p.requires_grad for p in model.parameters()):
            embedded.requires_grad_()  # a frozen base has its backward all the same
        hidden = inner.model(inputs_embeds=embedded, attention_mask=batch["attention_mask"], use_cache=False)
        return loss(inner, hidden.last_hidden_state, batch["labels"])

    return of_model


def contenders(base: nn.Module, batch: Batch) -> dict[str, Callable[[], Contender]]:
    """Return what builds each contender on the tensors of ``base``; full fine-tuning, which changes it, has a copy."""
    adamw = ours.torch_stepper

    def with_peft(**options: Any) -> nn.Module:
        targets = {"target_modules": list(TARGETS), "task_type": "CAUSAL_LM"}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return peft.get_peft_model(
                sharing_copy(base), peft.LoraConfig(r=RANK, lora_alpha=ALPHA, **targets), **options
            )

    def contender(model: nn.Module, loss: Any, stepper: Any, **options: Any) -> Contender:
        trained = [p for p in model.parameters() if p.requires_grad]
        return Contender(model.train(), loss, stepper(trained, LR, MAX_NORM, **options) if trained else None, batch)

    def with_ours() -> nn.Module:
        return inject(sharing_copy(base), LoRAConfig(r=RANK, alpha=ALPHA, target_modules=TARGETS))

    is_wide = next(base.parameters()).dtype == torch.float32
    best = {} if is_wide else {"autocast_adapter_dtype": False}
    our_loss, learned_loss = hidden_loss(ours.loss_of), hidden_loss(ours.learned_positions_loss)
    return {
        "frozen": lambda: contender(sharing_copy(base).requires_grad_(False), our_loss, None),
        "full": lambda: contender(copy.deepcopy(base), own_loss, adamw, fused=True),
        "PEFT": lambda: contender(with_peft(), own_loss, adamw),
        "PEFT, best": lambda: contender(with_peft(**best), own_loss, adamw, fused=True),
        "PEFT, best, learned positions": lambda: contender(with_peft(**best), learned_loss, adamw, fused=True),
        "ours": lambda: contender(with_ours(), our_loss, ours.stepper_of),
    }


def measure(rounds: int, quick: bool = False) -> dict[str, Any]:
    config = model_config(quick)
    batch = batch_like_quickstart(config.vocab_size)
    built = {name: build() for name, build in contenders(base_of(config), batch).items()}
    losses = {name: one.step() for name, one in built.items()}  # B starts at zero: all are the base's
    assert max(losses.values()) - min(losses.values()) < 1e-3, losses
    return {
        "model": f"{'tiny' if quick else 'SmolLM2-135M'} shape, float32",
        "batch": list(batch["input_ids"].shape),
        "ours": ours.described(),
        **timed({name: one.step for name, one in built.items()}, rounds, warm_up=1),
    }
