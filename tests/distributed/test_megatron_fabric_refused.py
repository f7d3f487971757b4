"""What ``megatron_lora`` in Fabric refuses, on 2 and 4 gloo ranks."""

import pytest
from torch import nn

from lightning_lora import LoRAConfig, inject
from lightning_lora.megatron.core import parallel_state
from tests import models
from tests.distributed.ranks import on_ranks
from tests.distributed.split import four_heads
from tests.distributed.split_fabric import batches, loss_of, make, start


def with_heads(heads: int) -> nn.Module:
    """An adapted Llama with a number of heads that four ranks do not divide, nor two its key-value heads."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=48, intermediate_size=64, num_hidden_layers=1, num_attention_heads=heads,
        num_key_value_heads=heads // 2, vocab_size=models.VOCAB,
    )  # fmt: skip
    return inject(LlamaForCausalLM(config), LoRAConfig(r=2))


@on_ranks(2, 4)
def test_groups_of_a_given_size_are_there_after_launch_and_must_divide_a_later_model(num_ranks: int) -> None:
    fabric = start(tensor_parallel_size=num_ranks)
    assert parallel_state().get_tensor_model_parallel_world_size() == num_ranks
    field, heads = ("num_attention_heads", 6) if num_ranks == 4 else ("num_key_value_heads", 3)
    message = f"{field}={heads} of LlamaForCausalLM is not divisible by tensor_parallel_size={num_ranks}"
    with pytest.raises(ValueError, match=message):
        fabric.setup(with_heads(6))


@on_ranks(2)
def test_what_cannot_be_served_is_said() -> None:
    fabric = start(tensor_parallel_size=2)
    with pytest.raises(ValueError, match=r"'megatron_lora' .* LlamaForCausalLM holds no adapters"):
        fabric.setup(four_heads())
    model = fabric.setup(make()[0])
    with pytest.raises(ValueError, match="ranks that share a model were given different batches"):
        loss_of(model, models.token_ids(2, 8, seed=fabric.global_rank))
    with pytest.raises(ValueError, match=r"call fabric.setup\(model\) before fabric.setup_dataloaders"):
        batches(start(tensor_parallel_size="auto"))
    start(tensor_parallel_size=1)
    message = "another strategy has laid the ranks out since this one did: 1 share a model, and here"
    with pytest.raises(ValueError, match=message):
        fabric.setup(make()[0])
    with pytest.raises(ValueError, match="1 share a model, and here"):
        batches(fabric)
