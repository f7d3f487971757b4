"""Ranks with unequal numbers of batches to evaluate, against one process that sees all of them."""

from typing import Any

import pytest
import torch

from tests import models
from tests.distributed.launch import launch
from tests.distributed.unequal_script import NUM_BATCHES, rows


@pytest.fixture(scope="module", params=["ddp", "fsdp_lora", "megatron_lora"])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return launch("unequal_script.py", 2, tmp_path_factory.mktemp(request.param), request.param)


def losses(rank: int, dataloader: int) -> list[float]:
    model = models.llama().train(False)  # an adapter that has not trained changes nothing
    with torch.no_grad():
        return [model(input_ids=batch, labels=batch).loss.item() for batch in rows(rank, dataloader).split(2)]


def test_every_batch_is_evaluated(ranks: list[dict[str, Any]]) -> None:
    for rank, found in enumerate(ranks):
        assert found["losses"] == pytest.approx(losses(rank, 0) + losses(rank, 1), rel=1e-5)


def test_metrics_are_means_over_all_batches(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        for dataloader in range(2):
            everyones = [loss for rank in range(2) for loss in losses(rank, dataloader)]
            assert len(everyones) == sum(NUM_BATCHES[dataloader])
            mean = sum(everyones) / len(everyones)
            assert found["metrics"][f"val_loss/dataloader_idx_{dataloader}"] == pytest.approx(mean, rel=1e-5)


def test_training_goes_on_as_without_validation(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        torch.testing.assert_close(found["with"], found["without"], rtol=0, atol=0)
        torch.testing.assert_close(found["with_norm"], ranks[0]["without_norm"], rtol=0, atol=0)


def test_every_batch_is_predicted(ranks: list[dict[str, Any]]) -> None:
    model = models.llama().train(False)
    for rank, found in enumerate(ranks):
        for dataloader, predicted in enumerate(found["predicted"]):
            with torch.no_grad():
                logits = model(input_ids=rows(rank, dataloader)).logits
            torch.testing.assert_close(predicted, logits, rtol=1e-4, atol=1e-5)
