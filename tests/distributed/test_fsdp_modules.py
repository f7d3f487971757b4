"""Modules and callbacks that ``fsdp_lora`` must live with, on two gloo ranks."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from tests import models
from tests.distributed.ranks import on_ranks
from tests.distributed.split import AfterTheSearch
from tests.distributed.training import (
    EXACT,
    GRADIENT_TOLERANCE,
    Finetuned,
    Recorded,
    alone,
    error_of,
    fit,
    from_all_ranks,
    rank_loader,
    rank_of,
)

ONE_STEP = {"limit_train_batches": 1}


@pytest.fixture(scope="module")
def single() -> dict[str, Tensor]:
    """Return the first gradients of one process."""
    return alone(**ONE_STEP).gradients


class Sharding(Recorded):
    """Shards its model itself, as for Lightning's ModelParallelStrategy."""

    def configure_model(self) -> None:
        from torch.distributed.fsdp import fully_shard

        for block in self.model.model.layers:
            fully_shard(block, mesh=self.device_mesh["data_parallel"])
        fully_shard(self.model, mesh=self.device_mesh["data_parallel"])


class OtherBase(Recorded):
    """A base that came out differently on every rank."""

    def __init__(self) -> None:
        super().__init__()
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.add_(0.01 * int(os.environ.get("RANK", 0)))


@pytest.mark.parametrize("build", [Sharding, OtherBase])
@on_ranks(2)
def test_gradients_do_not_change_with_a_module_of_another_making(
    single: dict[str, Tensor], build: type[Recorded]
) -> None:
    module = build()
    fit(None, module, **ONE_STEP)
    torch.testing.assert_close(module.gradients, single, **GRADIENT_TOLERANCE)


@on_ranks(2)
def test_gradients_are_reduced_before_a_manual_step_reads_them(single: dict[str, Tensor]) -> None:
    module = Finetuned()
    fit(None, module, **ONE_STEP)
    torch.testing.assert_close(module.gradients, single, **GRADIENT_TOLERANCE)
    expected = sum(value.square().sum().item() for value in single.values())
    assert module.norms == pytest.approx([expected], rel=1e-4)


class SplitByColumns(Recorded):
    """Shards a weight by tensor parallelism, which ``fsdp_lora`` leaves to others."""

    def configure_model(self) -> None:
        from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

        plan = {"model.layers.0.mlp.up_proj": ColwiseParallel()}
        parallelize_module(self.model, self.device_mesh["data_parallel"], plan)


@on_ranks(2)
def test_tensor_parallelism_of_the_users_is_refused_by_name() -> None:
    error = error_of(fit, None, SplitByColumns(), **ONE_STEP)
    assert "'model.layers.0.mlp.up_proj.weight' is spread over ranks by tensor parallelism" in error


class Headed(Recorded):
    """A task head outside the pretrained model, with buffers, drawn differently on every rank."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(int(os.environ.get("RANK", 0)))
        self.head = torch.nn.Sequential(torch.nn.Linear(models.VOCAB, 4), torch.nn.BatchNorm1d(4))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.head(self.model(input_ids=batch).logits.flatten(0, 1)).square().mean()


@on_ranks(2)
def test_replicated_heads_are_broadcast_from_rank_0(tmp_path: Path) -> None:
    module = Headed()
    fit(tmp_path, module)
    trained = {name: value for name, value in module.head.state_dict().items() if "running" not in name}
    torch.testing.assert_close(trained, from_all_ranks(trained)[0], **EXACT)
    saved = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)["state_dict"]
    assert len([name for name in saved if "head." in name]) == 7


class Validated(Recorded):
    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.model(input_ids=batch, labels=batch).loss, sync_dist=True)


@on_ranks(2)
def test_early_stopping_stops_all_ranks_and_rank_0_alone_logs(tmp_path: Path) -> None:
    rank, _ = rank_of()
    loaders = {"val_dataloaders": rank_loader(*rank_of())}
    stopping = EarlyStopping("val_loss", mode="max", patience=1)
    logger = CSVLogger(tmp_path, name="logs", version=f"of_rank_{rank}")
    trainer = fit(None, Validated(), loaders=loaders, callbacks=(stopping,), max_epochs=9, logger=logger)
    assert trainer.current_epoch == 2
    torch.distributed.barrier()
    logs = tmp_path / "logs"
    assert [path.name for path in logs.iterdir()] == ["of_rank_0"]
    if rank == 0:
        assert "val_loss" in (logs / "of_rank_0" / "metrics.csv").read_text()


class Tuned(Recorded):
    lr = 1e-2

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


@on_ranks(2)
def test_the_learning_rate_search_leaves_adapters_as_they_were(tmp_path: Path) -> None:
    search = AfterTheSearch(num_training_steps=3, early_stop_threshold=None)
    fit(tmp_path, Tuned(), callbacks=(search,))
    assert all(not value.any() for name, value in search.adapters.items() if name.endswith("lora_B"))
    torch.distributed.barrier()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
