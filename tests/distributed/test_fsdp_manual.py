"""Backwards, turns of optimizers and unfreezing by hand under ``fsdp_lora``, on two gloo ranks."""

import os
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import BaseFinetuning
from torch import Tensor

from lightning_lora import FSDPLoRAStrategy
from lightning_lora.ops.sharded import is_sharded
from tests import models
from tests.distributed.ranks import on_ranks
from tests.distributed.training import EXACT, SHARDED, STEP_TOLERANCE, Finetuned, Recorded, fit, from_all_ranks, state


class Unseeded(Finetuned):
    """Draws what is frozen anew on every rank, a row of a table among it, and unfreezes a head in the second step.

    Runs backward itself, past ``manual_backward``, which all works under DDP.
    """

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(int(os.environ.get("RANK", 0)))
        self.head = torch.nn.Linear(models.VOCAB, 4).requires_grad_(False)
        table = torch.nn.Embedding(5000, 32, _weight=torch.ones(5000, 32))
        table.weight.data[777].normal_()  # as resize_token_embeddings does
        self.model.model.embed_tokens = table

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        if batch_idx == 1:
            self.head.requires_grad_(True)
        optimizer = self.optimizers()
        self.head(self.model(input_ids=batch).logits).square().mean().backward()
        self.clip_gradients(optimizer, gradient_clip_val=0.05)
        optimizer.step()
        optimizer.zero_grad()


@on_ranks(2)
def test_replicas_are_equal_without_seeds_and_with_the_user_s_own_backward() -> None:
    module = Unseeded()
    fit(None, module, limit_train_batches=3)
    whole = {name: value.detach().clone() for name, value in module.named_parameters() if not is_sharded(value)}
    assert "model.model.embed_tokens.weight" in whole
    torch.testing.assert_close(whole, from_all_ranks(whole)[0], **EXACT)


class Alternating(Finetuned):
    """Two optimizers in turn, each with the other's parameters frozen, and a loss without gradients between."""

    def configure_optimizers(self) -> Any:
        trained = {name: p for name, p in self.named_parameters() if p.requires_grad}
        factors = [p for name, p in trained.items() if name.endswith("lora_A")]
        others = [p for name, p in trained.items() if not name.endswith("lora_A")]
        return [torch.optim.SGD(parameters, lr=0.5) for parameters in (factors, others)]

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        pass

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            self.toggle_optimizer(optimizer)
            self.model(input_ids=batch)
            self.untoggle_optimizer(optimizer)
            self.manual_backward(self.model(input_ids=batch, labels=batch).loss)
            self.model(input_ids=batch)  # what it gathers must not be taken for the weights after the step
            optimizer.step()
            optimizer.zero_grad()


@on_ranks(2)
def test_what_stays_gathered_follows_steps_and_turns_of_optimizers() -> None:
    def adapters(**options: Any) -> dict[str, Tensor]:
        module = Alternating()
        fit(None, module, FSDPLoRAStrategy(**options, **SHARDED), lora={"modules_to_save": ["lm_head"]})
        return state(module)

    expected = adapters(shard_adapters=False)
    torch.testing.assert_close(adapters(shard_adapters=True), expected, **STEP_TOLERANCE)
    kept = adapters(shard_adapters=True, reshard_after_forward=False)
    torch.testing.assert_close(kept, expected, **STEP_TOLERANCE)


class Thawing(BaseFinetuning):
    def freeze_before_training(self, pl_module: Any) -> None:
        pass

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        self.unfreeze_and_add_param_group(pl_module.model.model.layers[1].mlp, optimizer)


@on_ranks(2)
def test_unfreezing_the_base_is_refused_by_name() -> None:
    with pytest.raises(RuntimeError, match="unfrozen after the base was sharded, and would not train"):
        fit(None, Recorded(), callbacks=(Thawing(),))
