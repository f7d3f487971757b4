"""``shard_adapters=True`` with a trained head and norms, on 2 and 4 gloo ranks against whole ones and one process."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_lora import FSDPLoRAStrategy, disabled, load_peft, merge, save_peft, unmerge
from lightning_lora.ops.sharded import is_sharded
from tests import models
from tests.distributed.ranks import on_ranks
from tests.distributed.training import EXACT, SHARDED, STEP_TOLERANCE, Recorded, alone, fit, state

HEADED: dict[str, Any] = {
    "lora": {"modules_to_save": ["lm_head", "norm"]}, "gradient_clip_val": 0.05, "max_epochs": 2,
    "accumulate_grad_batches": 2,
}  # fmt: skip
RUNS = [(2, False), (2, True), (4, True)]  # ranks, and whether adapters are in shards
runs = pytest.mark.parametrize(("num_ranks", "shards"), RUNS)


def trained(directory: Path | None, shards: bool, **settings: Any) -> Recorded:
    module = Recorded()
    fit(directory, module, FSDPLoRAStrategy(shard_adapters=shards, **SHARDED), **HEADED, **settings)
    return module


@pytest.fixture(scope="module")
def single() -> dict[str, Tensor]:
    return state(alone(**HEADED))


@on_ranks()
def train_with_files(directory: Path, num_ranks: int, shards: bool) -> Any:
    """Train with a file of each epoch; return the adapters."""
    module = trained(directory, shards)
    assert module.trainer.global_step == 4
    return state(module)


def folder(num_ranks: int, shards: bool) -> str:
    return f"{num_ranks} ranks, {'sharded' if shards else 'whole'}"


@pytest.fixture(scope="module")
def adapters(directory: Path) -> dict[tuple[int, bool], dict[str, Tensor]]:
    """Return what every run of ``RUNS`` ended with; its files are in its ``folder``."""
    found = {}
    for num_ranks, shards in RUNS:
        first, *others = train_with_files(directory / folder(num_ranks, shards), num_ranks=num_ranks, shards=shards)
        for other in others:
            torch.testing.assert_close(other, first, **EXACT)
        found[num_ranks, shards] = first
    return found


@runs
def test_training_clipping_and_accumulation_equal_one_process(
    adapters: dict[tuple[int, bool], Any], single: dict[str, Tensor], num_ranks: int, shards: bool
) -> None:
    torch.testing.assert_close(adapters[num_ranks, shards], single, **STEP_TOLERANCE)


@runs
@on_ranks()
def test_what_trains_is_in_shards_and_can_be_disabled_merged_and_exported(
    tmp_path: Path, num_ranks: int, shards: bool
) -> None:
    module, batch = trained(None, shards, limit_train_batches=2), models.token_ids(4, 8, seed=2)
    num_sharded = sum(is_sharded(parameter) for parameter in module.parameters() if parameter.requires_grad)
    # 28 factors, the head and two norms of each block; the final norm stays whole
    assert num_sharded > 28 if shards else num_sharded == 0
    with torch.no_grad():
        logits = module.model(batch).logits
        with disabled(module):
            without = module.model(batch).logits
        assert torch.equal(module.model(batch).logits, logits)
        merge(module)
        merged = module.model(batch).logits
        unmerge(module)
        torch.testing.assert_close(without, models.llama()(batch).logits, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(merged, logits, rtol=1e-4, atol=1e-5)
    save_peft(module.model, tmp_path)
    torch.testing.assert_close(state(load_peft(models.llama(), tmp_path)), state(module), **EXACT)


@on_ranks(2)
def test_files_cross_over(adapters: dict[tuple[int, bool], Any], directory: Path) -> None:
    def resumed(written: bool, shards: bool) -> dict[str, Tensor]:
        return state(trained(None, shards, ckpt_path=directory / folder(2, written) / "epoch=0.ckpt"))

    for written, shards in ((False, True), (True, False)):
        torch.testing.assert_close(resumed(written, shards), adapters[2, False], **STEP_TOLERANCE)
    again = resumed(True, True)
    torch.testing.assert_close(again, adapters[2, False], **STEP_TOLERANCE)
    torch.testing.assert_close(again, adapters[2, True], **EXACT)


@pytest.mark.usefixtures("adapters")
def test_the_files_of_all_are_alike(directory: Path) -> None:
    first, *others = (
        torch.load(directory / folder(*run) / "epoch=1.ckpt", weights_only=True)["state_dict"] for run in RUNS
    )
    for other in others:
        assert [(n, v.shape) for n, v in other.items()] == [(n, v.shape) for n, v in first.items()]


BY_VALUE = {"gradient_clip_val": 1e-3, "gradient_clip_algorithm": "value", "limit_train_batches": 1}


@pytest.fixture(scope="module")
def single_by_value() -> dict[str, Tensor]:
    return state(alone(**BY_VALUE))


@on_ranks(2)
def test_clipping_by_value_equals_one_process(single_by_value: dict[str, Tensor]) -> None:
    module = Recorded()
    fit(None, module, FSDPLoRAStrategy(shard_adapters=True), **BY_VALUE)
    torch.testing.assert_close(state(module), single_by_value, **STEP_TOLERANCE)


class Quasi(Recorded):
    """Keeps an optimizer state that has no tensor in the shape of a parameter."""

    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS([p for p in self.parameters() if p.requires_grad], lr=0.01, max_iter=2)


@on_ranks(2)
def test_an_optimizer_without_moments_is_saved_whole(tmp_path: Path) -> None:
    module, path = Quasi(), tmp_path / "epoch=0.ckpt"
    fit(tmp_path, module, FSDPLoRAStrategy(shard_adapters=True, **SHARDED))
    with pytest.raises(ValueError, match="'fsdp_lora' with shard_adapters=False"):
        fit(None, Quasi(), FSDPLoRAStrategy(shard_adapters=True, **SHARDED), ckpt_path=path)
    whole = Quasi()
    fit(None, whole, FSDPLoRAStrategy(shard_adapters=False, **SHARDED), ckpt_path=path)
    torch.testing.assert_close(state(whole), state(module), **EXACT)


@on_ranks(2)
def test_what_trains_in_two_dtypes_can_be_in_shards(tmp_path: Path) -> None:
    def after(shards: bool) -> dict[str, Tensor]:
        module = Recorded()
        lora = {"modules_to_save": ["norm", "lm_head"]}  # in bfloat16, beside adapters in float32
        strategy = FSDPLoRAStrategy(shard_adapters=shards, **SHARDED)
        fit(tmp_path / str(shards), module, strategy, lora=lora, precision="bf16-true")
        return state(module)

    # bfloat16 has 8 bits, and Adam turns the rounding of small gradients into steps of 1e-2
    torch.testing.assert_close(after(True), after(False), rtol=2e-2, atol=2e-2)
