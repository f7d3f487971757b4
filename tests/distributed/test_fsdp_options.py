"""Options of ``fsdp_lora`` on 2 and 4 gloo ranks, which do not change gradients, and what is refused at the start."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor

from lightning_lora import FSDPLoRAStrategy, LoRACallback
from lightning_lora.fabric import FSDPLoRAStrategy as FabricStrategy
from tests import runs
from tests.distributed.counting import counted_collectives
from tests.distributed.ranks import on_ranks
from tests.distributed.training import (
    GRADIENT_TOLERANCE,
    SHARDED,
    Recorded,
    alone,
    fit,
    from_all_ranks,
)

ONE_STEP = {"limit_train_batches": 1}


@pytest.fixture(scope="module")
def single() -> dict[str, Tensor]:
    """Return the first gradients of one process."""
    return alone(**ONE_STEP).gradients


OPTIONS: dict[str, dict[str, Any]] = {
    "checkpointed": {"activation_checkpointing": True},
    "compiled": {"compile": "eager", "activation_checkpointing": True},
    "kept": {"reshard_after_forward": False},
    "offloaded": {"cpu_offload": True, **SHARDED},
    "named": {"shard_modules": ["LlamaMLP", "self_attn"]},
    "hybrid": {"replicate_size": 2, **SHARDED},  # on two ranks each holds the whole base
}


@pytest.mark.parametrize(
    ("num_ranks", "name"), [*((2, name) for name in OPTIONS), (4, "hybrid")]
)  # on four ranks, halves on two pairs
@on_ranks()
def test_gradients_do_not_change_with_an_option(single: dict[str, Tensor], num_ranks: int, name: str) -> None:
    module = Recorded()
    fit(None, module, FSDPLoRAStrategy(**OPTIONS[name]), **ONE_STEP)
    torch.testing.assert_close(module.gradients, single, **GRADIENT_TOLERANCE)


PRECISIONS = {"bf16-true": torch.bfloat16, "bf16-mixed": torch.float32}  # and the dtype of the base


@pytest.fixture(scope="module")
def losses_in_half_precision() -> dict[str, list[float]]:
    return {precision: alone(precision=precision).losses for precision in PRECISIONS}


@pytest.mark.parametrize("precision", PRECISIONS)
@on_ranks(2)
def test_adapters_stay_float32(tmp_path: Path, losses_in_half_precision: dict[str, Any], precision: str) -> None:
    module = Recorded()
    with counted_collectives() as traffic:
        fit(tmp_path, module, FSDPLoRAStrategy(**SHARDED), precision=precision)
    # bfloat16 has 8 bits: a loss near 4.6 is rounded by up to 0.01 per operation on it
    expected, losses = losses_in_half_precision[precision], torch.tensor(from_all_ranks(module.losses)).mean(0)
    torch.testing.assert_close(losses, torch.tensor(expected), rtol=5e-3, atol=5e-3)
    assert {p.dtype for p in module.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in module.parameters() if not p.requires_grad} == {PRECISIONS[precision]}
    assert traffic.gathered_dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"replicate_size": 0}, "replicate_size=0 must be a positive integer"),
        ({"min_shard_numel": -1}, "min_shard_numel=-1 must be a positive integer, or 0"),
        ({"shard_modules": "Block"}, r"must be a list: \['Block'\]"),
        ({"shard_modules": [torch.nn.Linear]}, "which is no name; write 'Linear'"),
        ({"compile": 1.5}, "name of a torch.compile backend"),
        ({"shard_module": ["Block"]}, "FSDPLoRAStrategy has no option 'shard_module'; nearest: shard_modules"),
        ({"cpu_offload": "yes"}, "must be True or False"),
    ],
)
def test_wrong_options_are_refused_at_once(settings: dict[str, Any], message: str) -> None:
    for strategy in (FSDPLoRAStrategy, FabricStrategy):
        with pytest.raises((ValueError, TypeError), match=message):
            strategy(**settings)


def test_averaging_callbacks_are_refused_by_name(tmp_path: Path) -> None:
    trainer = runs.trainer(tmp_path, LoRACallback(r=4), EMAWeightAveraging(), strategy="fsdp_lora")
    with pytest.raises(ValueError, match="EMAWeightAveraging copies the whole model, which no rank holds"):
        trainer.fit(runs.LanguageModule(), runs.loader())


def test_a_model_without_adapters_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no adapters: add LoRACallback"):
        runs.trainer(tmp_path, strategy="fsdp_lora").fit(runs.LanguageModule(), runs.loader())


def test_a_typo_in_shard_modules_names_what_is_near(tmp_path: Path) -> None:
    trainer = runs.trainer(tmp_path, LoRACallback(r=4), strategy=FSDPLoRAStrategy(shard_modules=["LlamaDecoderLayr"]))
    with pytest.raises(ValueError, match="'LlamaDecoderLayr' names no module .*LlamaDecoderLayer"):
        trainer.fit(runs.LanguageModule(), runs.loader())


def test_a_list_of_blocks_in_shard_modules_is_told_from_its_blocks(tmp_path: Path) -> None:
    trainer = runs.trainer(tmp_path, LoRACallback(r=4), strategy=FSDPLoRAStrategy(shard_modules=["layers"]))
    with pytest.raises(ValueError, match=r"names 'model.layers', a ModuleList.* members: \['LlamaDecoderLayer'\]"):
        trainer.fit(runs.LanguageModule(), runs.loader())


def test_a_model_without_blocks_is_said_to_be_whole(tmp_path: Path) -> None:
    class Flat(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = torch.nn.Linear(8, 8), torch.nn.Linear(8, 1)

        def training_step(self, batch, batch_idx):
            return self.second(self.first(batch)).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    trainer = runs.trainer(tmp_path, LoRACallback(r=4), strategy="fsdp_lora")
    with pytest.warns(UserWarning, match="nothing of Flat is in shards"):
        trainer.fit(Flat(), torch.utils.data.DataLoader(torch.randn(8, 8), 4))


def test_a_model_in_shards_is_not_taken_for_a_whole_one(tmp_path: Path) -> None:
    module = runs.LanguageModule()
    runs.trainer(tmp_path, LoRACallback(r=4), strategy="fsdp_lora").fit(module, runs.loader())
    with pytest.raises(ValueError, match="is in shards, from a run with 'fsdp_lora'"):
        runs.trainer(tmp_path, LoRACallback(r=4)).fit(module, runs.loader())
