"""Biases, norms and the output layer of a ``GPTModel`` train whole, on two gloo ranks against one process."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_lora import remove
from lightning_lora.model.state import named_trained_whole
from lightning_lora.ops.sharded import whole
from tests.distributed.gpt import STEP_TOLERANCE, Alone, Module, biased, hugging_face, run, sequence_parallelism
from tests.distributed.ranks import on_ranks
from tests.distributed.training import alone, from_all_ranks, rank_of


@pytest.fixture(scope="module")
def source_with_biases(directory: Path) -> Path:
    biased().save_pretrained(directory / "biased")
    return directory / "biased"


@pytest.fixture(scope="module")
def single_biases() -> dict[str, Tensor]:
    """Return the biases of queries, keys and values as Megatron-core stacks them, four groups of heads each."""
    module = Alone()
    module.model = biased().train()
    alone(module, lora={"bias": "lora_only"})
    stacked = {}
    for index, layer in enumerate(module.model.model.layers):
        parts = [getattr(layer.self_attn, f"{x}_proj").bias.detach().view(4, -1) for x in "qkv"]
        stacked[f"decoder.layers.{index}.self_attention.linear_qkv.bias"] = torch.cat(parts, 1).flatten()
    return stacked


@sequence_parallelism
@on_ranks(2)
def test_biases_of_adapted_layers_can_train(
    source_with_biases: Path, single_biases: dict[str, Tensor], sequence_parallel: bool
) -> None:
    module = Module(source_with_biases, sequence_parallel=sequence_parallel)
    run(None, 2, module, lora={"bias": "lora_only"})
    parameters = dict(module.model.named_parameters())
    for name, expected in single_biases.items():
        torch.testing.assert_close(whole(parameters[name]).detach(), expected, **STEP_TOLERANCE)


WHOLE = {"decoder.final_layernorm.weight": "model.norm.weight", "output_layer.weight": "lm_head.weight"} | {
    f"decoder.layers.{i}.self_attention.q_layernorm.weight": f"model.layers.{i}.self_attn.q_norm.weight" for i in (0, 1)
}


@pytest.fixture(scope="module")
def single_whole() -> dict[str, Tensor]:
    """Return what trains whole of Hugging Face's model, under Megatron-core's names."""
    lora = {"target_modules": ["q_proj"], "modules_to_save": ["q_norm", "model.norm", "lm_head"]}
    trained = dict(alone(Alone(), lora=lora).model.named_parameters())
    return {ours: trained[theirs].detach() for ours, theirs in WHOLE.items()}


@sequence_parallelism
@on_ranks(2)
def test_norms_and_the_output_layer_can_train_whole(
    hf: Path, single_whole: dict[str, Tensor], sequence_parallel: bool
) -> None:
    module, names = Module(hf, sequence_parallel=sequence_parallel), ["q_layernorm", "final_layernorm", "output_layer"]
    run(None, 2, module, lora={"target_modules": ["q_proj"], "modules_to_save": names})
    named = module.model.named_parameters()
    trained = {n: whole(p).detach().clone() for n, p in named if any(name in n for name in names)}
    torch.testing.assert_close(trained, single_whole, **STEP_TOLERANCE)


class Plain(Module):
    """Steps by SGD, which rounding does not turn into whole steps."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=1e-2)


HEADS = {"target_modules": ["q_proj"], "modules_to_save": ["q_layernorm", "final_layernorm", "output_layer"]}


@pytest.mark.parametrize(
    ("build", "lora"), [(hugging_face, HEADS), (biased, {"bias": "lora_only"})], ids=["heads", "biases"]
)
@on_ranks(2)
def test_what_of_a_megatron_model_trains_stays_wide(
    tmp_path: Path, build: Callable[[], Any], lora: dict[str, Any]
) -> None:
    if rank_of()[0] == 0:
        build().save_pretrained(tmp_path / "source")

    def values(size: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return what trained, whole, and what it was at the start."""
        module = Plain(tmp_path / "source")
        run(tmp_path / str(size), size, module, precision="bf16-true", lora=lora)
        named = named_trained_whole(module.model)
        assert {parameter.dtype for parameter in named.values()} == {torch.float32}
        after = {name: whole(p).detach().clone() for name, p in named.items()}
        remove(module.model)
        parameters = dict(module.model.named_parameters())
        assert {parameter.dtype for parameter in parameters.values()} == {torch.bfloat16}
        for name, value in from_all_ranks(after)[0].items():
            assert torch.equal(after[name], value)
        return after, {name: whole(parameters[name]).detach().clone() for name in named}

    (one, start), (split, _) = values(1), values(2)
    assert one.keys() == split.keys()
    for name, value in split.items():
        moved = (one[name] - start[name].float()).abs().max().item()
        assert moved > 0
        # products in parts are rounded to bfloat16 at another place: 2^-8 of the largest addend of a gradient
        torch.testing.assert_close(value, one[name], rtol=0, atol=0.1 * moved)
