"""Which models ``megatron_lora`` splits, by transformers' plans or the user's, and what it refuses with the remedy."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from lightning_lora import MegatronLoRAStrategy, merge
from lightning_lora.ops.sharded import is_sharded, local_part
from tests import models
from tests.distributed.ranks import on_ranks
from tests.distributed.split import GRADIENT_TOLERANCE, SPLIT, Module, four_heads, run
from tests.distributed.training import STEP_TOLERANCE, alone, fit, from_all_ranks, rank_loader, rank_of, state

TWO_STEPS: dict[str, Any] = {"limit_train_batches": 2}


@pytest.fixture
def single(name: str) -> tuple[dict[str, Tensor], list[float]]:
    module = alone(Module(name), **TWO_STEPS)
    return state(module), module.losses


@pytest.mark.parametrize("name", SPLIT)
@on_ranks(2)
def test_two_steps_of_a_family_equal_one_process(single: tuple[Any, Any], name: str) -> None:
    _, module = run(None, 2, Module(name), **TWO_STEPS, validates=False)
    adapters, losses = single
    torch.testing.assert_close(
        torch.tensor(from_all_ranks(module.losses)).mean(0), torch.tensor(losses), **STEP_TOLERANCE
    )
    torch.testing.assert_close(state(module), adapters, **STEP_TOLERANCE)


@pytest.mark.parametrize("name", ["bert"])
@on_ranks(2)
def test_a_plan_of_the_users_is_followed(single: tuple[Any, Any], name: str) -> None:
    plan = {"encoder.layer.*.intermediate.dense": "colwise", "encoder.layer.*.output.dense": "rowwise"}
    _, module = run(None, 2, Module(name), **TWO_STEPS, options={"plan": plan}, validates=False)
    torch.testing.assert_close(state(module), single[0], **STEP_TOLERANCE)
    split = [name for name, parameter in module.named_parameters() if is_sharded(parameter)]
    # two blocks: of the first layer weight, bias and B, of the second weight and A
    assert len(split) == 2 * 5
    assert all("intermediate.dense" in name or "output.dense" in name for name in split)


class OnMeta(Module):
    def __init__(self, directory: str) -> None:
        super().__init__()
        self.directory = directory
        self.model: Any = None

    def configure_model(self) -> None:
        if self.model is None:
            self.model = models.on_meta(AutoModelForCausalLM, Path(self.directory))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    four_heads().save_pretrained(tmp_path)
    return tmp_path


@on_ranks(2)
def test_a_base_on_meta_is_read_in_slices(saved: Path) -> None:
    def gradients(module: Module) -> dict[str, Tensor]:
        run(None, 2, module, limit_train_batches=1, validates=False)
        return {name: local_part(gradient) for name, gradient in module.gradients.items()}

    torch.testing.assert_close(gradients(OnMeta(str(saved))), gradients(Module()), **GRADIENT_TOLERANCE)


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    (
        "llama", {"options": {"plan": {"layers.*.self_attn.q_proj": "columnwise"}}},
        "the plan's word 'columnwise' .* is not served; served are 'colwise'",
    ),
    (
        "llama", {"options": {"plan": {"layers.*.self_attn.query": "colwise"}}},
        r"the plan's 'layers.*.self_attn.query' names no module",
    ),
    ("llama", {"lora": {"use_dora": True}}, "use_dora, lora_bias, PiSSA and OLoRA are not served"),
    ("gpt2", {}, "GPT2LMHeadModel has no tensor-parallel plan"),
    (
        "llama", {"lora": {"modules_to_save": ["down_proj"], "target_modules": ["q_proj"]}},
        "'model.layers.0.mlp.down_proj' trains its own 'weight'",
    ),
    ("tied llama", {"lora": {"target_modules": ["embed_tokens"]}}, "the tied embedding or output head is adapted"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "settings", "message"), REFUSED)
@on_ranks(2)
def test_what_cannot_be_split_is_said(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(None, 2, Module(name), limit_train_batches=1, **settings)


@on_ranks(2)
def test_different_batches_of_ranks_that_share_a_model_are_refused() -> None:
    loaders = {"train_dataloaders": rank_loader(*rank_of())}
    with pytest.raises(ValueError, match="ranks that share a model were given different batches"):
        fit(None, Module(), MegatronLoRAStrategy(tensor_parallel_size=2), loaders=loaders)


@on_ranks(2)
def test_a_model_of_another_run_on_other_ranks_is_refused() -> None:
    module = Module()
    run(None, 2, module, limit_train_batches=1, validates=False)
    message = "LlamaForCausalLM is split over 2 ranks, from another run, and this one has 1 that share a model"
    with pytest.raises(ValueError, match=message):
        run(None, 1, module, limit_train_batches=1)


@on_ranks(2)
def test_a_model_whose_adapters_were_merged_for_good_is_refused() -> None:
    module = Module()
    run(None, 2, module, limit_train_batches=1, validates=False)
    merge(module, remove=True)
    with pytest.raises(ValueError, match="was split over ranks by a former run under 'megatron_lora'"):
        run(None, 2, module, limit_train_batches=1)


@on_ranks(4)
def test_heads_that_ranks_do_not_divide_are_said_with_the_numbers() -> None:
    with pytest.raises(ValueError) as refused:
        run(None, 4, Module("qwen3"), limit_train_batches=1)
    assert str(refused.value) == (
        "num_key_value_heads=2 of Qwen3ForCausalLM is not divisible by tensor_parallel_size=4; sizes that divide it: 1, 2"
    )
