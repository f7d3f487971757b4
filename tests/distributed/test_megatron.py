"""``megatron_lora`` in the Trainer on 2 and 4 gloo ranks against one process: steps, and what moves between ranks."""

import pathlib
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor

from lightning_lora import LoRACallback, MegatronLoRAStrategy, disabled, load_peft, merge, merged, save_peft, unmerge
from lightning_lora.ops.sharded import is_sharded
from tests import models
from tests.distributed.counting import counted_collectives
from tests.distributed.ranks import on_ranks
from tests.distributed.split import GRADIENT_TOLERANCE, AfterTheSearch, Module, four_heads, layouts, run, whole_factors
from tests.distributed.training import (
    EXACT,
    PROMPTS,
    STEP_TOLERANCE,
    alone,
    from_all_ranks,
    rank_loader,
    rank_of,
    seeded,
    state,
)

HIDDEN = 4 * 8 * 32  # batch, tokens, hidden size: what a row-parallel layer sums


@pytest.fixture(scope="module")
def single() -> dict[str, Any]:
    """Return what there is to see of two epochs on one process."""
    module = alone(Module(), max_epochs=2)
    assert module.functions["_GatedMLPBackward"] == 2
    text = module.model.eval().generate(PROMPTS[:1], max_new_tokens=4, do_sample=False)
    return {
        "gradients": module.gradients, "adapters": state(module), "losses": module.losses,
        "functions": module.functions, "text": text,
    }  # fmt: skip


@layouts
@on_ranks()
def test_two_epochs_equal_one_process(tmp_path: Path, single: dict[str, Any], num_ranks: int, size: int) -> None:
    trainer, module = run(tmp_path, size, max_epochs=2)
    whole = whole_factors(module)
    # a split factor's gradient is this rank's part; those of whole factors are all there
    names = [name.removeprefix("model.") for name in whole]
    gradients, expected = ({n: g[n] for n in names} for g in (module.gradients, single["gradients"]))
    torch.testing.assert_close(gradients, expected, **GRADIENT_TOLERANCE)
    torch.testing.assert_close(state(module), single["adapters"], **STEP_TOLERANCE)
    mean_losses = torch.tensor(from_all_ranks(module.losses)).mean(0)
    torch.testing.assert_close(mean_losses, torch.tensor(single["losses"]), **STEP_TOLERANCE)
    assert module.functions == single["functions"]
    assert torch.equal(module.texts[-1], single["text"])
    torch.testing.assert_close(whole, from_all_ranks(whole)[0], **EXACT)

    # weights of 14 layers, one factor of each, the output head and the input embedding
    assert len([name for name, p in module.named_parameters() if is_sharded(p)]) == 14 + 14 + 2

    # the embedding, two row-parallel layers in each of two blocks, and the output head's parts put together: the base's
    forward = module.traffic[-1]
    assert forward["all_reduce"] == [HIDDEN * size // num_ranks] * 5
    assert forward["reduce_scatter"] == []
    assert len(forward["all_gather"]) <= 1

    # a save gathers no base, but the split factors, and Adam's two moments
    with counted_collectives() as saving:
        trainer.save_checkpoint(tmp_path / "again.ckpt")
    assert sum(saving["all_gather"]) <= 3 * sum(value.numel() for value in state(module).values())


@layouts
@on_ranks()
def test_merged_and_exported_it_is_the_model_of_one_process(tmp_path: Path, num_ranks: int, size: int) -> None:
    _, module = run(None, size, validates=False, limit_train_batches=1)
    batch = models.token_ids(4, 8, seed=2)
    with torch.no_grad():
        logits = module.model(batch).logits
        with merged(module):
            inside = module.model(batch).logits
        again = module.model(batch).logits
        merge(module)
        unmerge(module)
        assert torch.equal(module.model(batch).logits, again)
    save_peft(module.model, tmp_path)
    loaded = load_peft(four_heads(), tmp_path)
    torch.testing.assert_close(state(loaded), state(module), **EXACT)
    with torch.no_grad():
        expected = loaded.eval()(batch).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(inside, logits, rtol=1e-4, atol=1e-5)
    assert torch.equal(again, logits)


@pytest.fixture(scope="module")
def dropped_losses() -> list[float]:
    with seeded(7):
        return alone(Module(), lora={"dropout": 0.3}).losses


@on_ranks(2)
def test_dropout_is_that_of_one_process_and_whole_factors_stay_bit_equal(
    single: dict[str, Any], dropped_losses: list[float]
) -> None:
    with seeded(7):
        _, module = run(None, 2, lora={"dropout": 0.3}, validates=False)
    # ranks share the model: the batch and so its mask are one process's
    torch.testing.assert_close(module.losses, dropped_losses, **STEP_TOLERANCE)
    torch.testing.assert_close(whole_factors(module), from_all_ranks(whole_factors(module))[0], **EXACT)
    assert abs(dropped_losses[1] - single["losses"][1]) > 1e-3


CLIPPED = {"gradient_clip_val": 0.05, "accumulate_grad_batches": 2}


@pytest.fixture(scope="module")
def single_clipped() -> dict[str, Tensor]:
    return state(alone(Module(), **CLIPPED))


@on_ranks(2, 4)
def test_clipping_and_accumulation_equal_one_process(single_clipped: dict[str, Tensor]) -> None:
    _, module = run(None, 2, **CLIPPED, validates=False)
    torch.testing.assert_close(state(module), single_clipped, **STEP_TOLERANCE)


class Tuned(Module):
    lr = 1e-2

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=self.lr, eps=1e-4)

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.model(input_ids=batch).logits


@on_ranks(2)
def test_tools_around_a_run_see_the_model_that_it_is(tmp_path: Path) -> None:
    module, search = Tuned(), AfterTheSearch(num_training_steps=3, early_stop_threshold=None)
    trainer, _ = run(tmp_path, 2, module, callbacks=(search,))
    assert all(not value.any() for name, value in search.adapters.items() if name.endswith("lora_B"))

    batch = models.token_ids(4, 8, seed=2)
    with torch.no_grad():
        expected = module.model(batch).logits
        with disabled(module):
            without = module.model(batch).logits
        torch.testing.assert_close(without, four_heads()(batch).logits, rtol=1e-5, atol=1e-5)
    predicting = pl.Trainer(
        accelerator="cpu", devices=2, strategy="megatron_lora", logger=False, enable_progress_bar=False,
        callbacks=[LoRACallback(r=4)], use_distributed_sampler=False, enable_model_summary=False,
    )  # fmt: skip
    [predicted] = predicting.predict(module, torch.utils.data.DataLoader(batch, batch_size=4))
    torch.testing.assert_close(predicted, expected, **EXACT)

    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, rank_loader(rank_of()[0] // 2, 1))
    assert len(module.losses) == 3 + 4 + 4  # of the search, and of two epochs
    with torch.no_grad():
        before = module.model(batch).logits
        merge(module, remove=True)
        torch.testing.assert_close(module.model(batch).logits, before, rtol=1e-4, atol=1e-5)


@on_ranks(2)
def test_megatron_core_does_not_widen_what_a_checkpoint_may_hold() -> None:
    MegatronLoRAStrategy()
    assert "megatron.core" in sys.modules
    assert pathlib.PosixPath not in torch.serialization.get_safe_globals()
