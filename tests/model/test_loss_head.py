"""``linear_cross_entropy`` with an output head that is whole, on one process."""

import pytest
import torch

from lightning_lora import LoRAConfig, inject, linear_cross_entropy, named_adapter_parameters
from tests import models, zoo
from tests.distributed.test_parallel_loss import HIDDEN, labels_of


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3"])
def test_the_loss_of_a_whole_head_is_transformers_own(name: str) -> None:
    model = zoo.named(name).build()
    batch = models.token_ids(4, 8)
    inject(model, LoRAConfig(r=4))
    models.fill_adapters(model)
    labels = labels_of(batch)
    loss = linear_cross_entropy(model, model.model(batch).last_hidden_state, labels)
    torch.testing.assert_close(loss, model(batch, labels=labels).loss)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for _, p in named_adapter_parameters(model))


def test_nothing_learned_on_a_whole_head_has_zero_gradients() -> None:
    model = inject(models.llama(), LoRAConfig(r=4))
    batch = models.token_ids()
    loss = linear_cross_entropy(model, model.model(batch).last_hidden_state, torch.full_like(batch, -100))
    loss.backward()
    assert loss.item() == 0.0
    assert all(p.grad is not None and not p.grad.any() for _, p in named_adapter_parameters(model))


def test_another_index_can_stand_for_what_is_not_learned() -> None:
    model, batch = models.llama(), models.token_ids()
    hidden, labels = model.model(batch).last_hidden_state, labels_of(batch)
    expected = linear_cross_entropy(model, hidden, labels)
    assert torch.equal(
        linear_cross_entropy(model, hidden, labels.masked_fill(labels < 0, -1), ignore_index=-1), expected
    )


def test_what_the_loss_does_not_know_is_said() -> None:
    batch = models.token_ids()
    hidden = torch.zeros(*batch.shape, HIDDEN)
    with pytest.raises(ValueError, match=r"hidden \[2, 6, 32\] and labels \[2, 7\] must be"):
        linear_cross_entropy(models.llama(), hidden[:, 1:], batch)
    with pytest.raises(ValueError, match="Encoder has no output head: pass a transformers causal"):
        linear_cross_entropy(models.encoder(), hidden, batch)
    scaled = models.llama()
    scaled.config.logits_scaling = 4.0
    with pytest.raises(ValueError, match=r"logits_scaling=4.0, which this loss does not know: use model\(.*labels"):
        linear_cross_entropy(scaled, hidden, batch)
