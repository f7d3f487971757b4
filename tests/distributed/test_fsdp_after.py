"""After a fit under ``fsdp_lora`` on 2 and 4 gloo ranks: another fit, merging, predicting, a PEFT directory."""

from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch

from lightning_lora import FSDPLoRAStrategy, LoRACallback, load_peft, merge, merged, save_peft
from tests import models
from tests.distributed.ranks import on_ranks
from tests.distributed.training import (
    EXACT,
    SHARDED,
    STEP_TOLERANCE,
    Recorded,
    alone,
    fit,
    from_all_ranks,
    rank_loader,
    rank_of,
    state,
)


@pytest.fixture(scope="module")
def losses_of_a_second_fit() -> list[float]:
    # Adam's moments start anew in a second fit
    module = alone(max_epochs=2)
    module.trainer.fit_loop.max_epochs = 3
    module.trainer.fit(module, rank_loader(0, 1))
    return module.losses[8:]


@on_ranks(2, 4)
def test_a_second_fit_goes_on(losses_of_a_second_fit: list[float]) -> None:
    module = Recorded()
    trainer = fit(None, module, FSDPLoRAStrategy(**SHARDED), max_epochs=2)
    trainer.fit_loop.max_epochs = 3
    trainer.fit(module, rank_loader(*rank_of()))
    mean_losses = torch.tensor(from_all_ranks(module.losses[8:])).mean(0)
    torch.testing.assert_close(mean_losses, torch.tensor(losses_of_a_second_fit), **STEP_TOLERANCE)


@on_ranks(2, 4)
def test_merging_and_predicting_give_the_same_logits(num_ranks: int) -> None:
    module, batch = Recorded(), models.token_ids(4, 8, seed=2)
    fit(None, module, FSDPLoRAStrategy(**SHARDED))
    with torch.no_grad():
        logits = module.model(batch).logits
        with merged(module):
            inside = module.model(batch).logits
        torch.testing.assert_close(inside, logits, rtol=1e-4, atol=1e-5)
        assert torch.equal(module.model(batch).logits, logits)
    predicting = pl.Trainer(
        accelerator="cpu", devices=num_ranks, strategy="fsdp_lora", logger=False, enable_progress_bar=False,
        callbacks=[LoRACallback(r=4)], use_distributed_sampler=False, enable_model_summary=False,
    )  # fmt: skip
    [predicted] = predicting.predict(module, torch.utils.data.DataLoader(batch, batch_size=4))
    torch.testing.assert_close(predicted, logits, **EXACT)
    merge(module, remove=True)
    with torch.no_grad():
        torch.testing.assert_close(module.model(batch).logits, logits, rtol=1e-4, atol=1e-5)


@on_ranks(2, 4)
def test_the_peft_directory_holds_what_was_trained(tmp_path: Path) -> None:
    module = Recorded()
    fit(None, module, FSDPLoRAStrategy(**SHARDED))
    save_peft(module.model, tmp_path)
    torch.testing.assert_close(state(load_peft(models.llama(), tmp_path)), state(module), **EXACT)
