"""Modules, optimizers and callbacks that ``fsdp_lora`` must live with, on two gloo ranks."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import BaseFinetuning, EarlyStopping
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from lightning_lora import FSDPLoRAStrategy
from lightning_lora.ops.sharded import is_sharded
from tests import models
from tests.distributed.ranks import on_ranks
from tests.distributed.split import AfterTheSearch
from tests.distributed.training import (
    EXACT,
    GRADIENT_TOLERANCE,
    SHARDED,
    STEP_TOLERANCE,
    Finetuned,
    Recorded,
    alone,
    error_of,
    fit,
    from_all_ranks,
    rank_loader,
    rank_of,
    state,
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


class Unseeded(Finetuned):
    """Draws what is frozen anew on every rank, a row of a table among it, and unfreezes a head in the second step.

    Runs backward itself, past ``manual_backward``, which all works under DDP.
    """

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(int(os.environ.get("RANK", 0)))
        self.head = torch.nn.Linear(models.VOCAB, 4).requires_grad_(False)
        table = torch.nn.Embedding(5000, 32, _weight=torch.ones(5000, 32))
        table.weight.data[777].normal_()  # as resize_token_embeddings does
        self.model.model.embed_tokens = table

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        if batch_idx == 1:
            self.head.requires_grad_(True)
        optimizer = self.optimizers()
        self.head(self.model(input_ids=batch).logits).square().mean().backward()
        self.clip_gradients(optimizer, gradient_clip_val=0.05)
        optimizer.step()
        optimizer.zero_grad()


@on_ranks(2)
def test_replicas_are_equal_without_seeds_and_with_the_user_s_own_backward() -> None:
    module = Unseeded()
    fit(None, module, limit_train_batches=3)
    whole = {name: value.detach().clone() for name, value in module.named_parameters() if not is_sharded(value)}
    assert "model.model.embed_tokens.weight" in whole
    torch.testing.assert_close(whole, from_all_ranks(whole)[0], **EXACT)


class Alternating(Finetuned):
    """Two optimizers in turn, each with the other's parameters frozen, and a loss without gradients between."""

    def configure_optimizers(self) -> Any:
        trained = {name: p for name, p in self.named_parameters() if p.requires_grad}
        factors = [p for name, p in trained.items() if name.endswith("lora_A")]
        others = [p for name, p in trained.items() if not name.endswith("lora_A")]
        return [torch.optim.SGD(parameters, lr=0.5) for parameters in (factors, others)]

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        pass

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            self.toggle_optimizer(optimizer)
            self.model(input_ids=batch)
            self.untoggle_optimizer(optimizer)
            self.manual_backward(self.model(input_ids=batch, labels=batch).loss)
            self.model(input_ids=batch)  # what it gathers must not be taken for the weights after the step
            optimizer.step()
            optimizer.zero_grad()


@on_ranks(2)
def test_what_stays_gathered_follows_steps_and_turns_of_optimizers() -> None:
    def adapters(**options: Any) -> dict[str, Tensor]:
        module = Alternating()
        fit(None, module, FSDPLoRAStrategy(**options, **SHARDED), lora={"modules_to_save": ["lm_head"]})
        return state(module)

    expected = adapters(shard_adapters=False)
    torch.testing.assert_close(adapters(shard_adapters=True), expected, **STEP_TOLERANCE)
    kept = adapters(shard_adapters=True, reshard_after_forward=False)
    torch.testing.assert_close(kept, expected, **STEP_TOLERANCE)


class Thawing(BaseFinetuning):
    def freeze_before_training(self, pl_module: Any) -> None:
        pass

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        self.unfreeze_and_add_param_group(pl_module.model.model.layers[1].mlp, optimizer)


@on_ranks(2)
def test_unfreezing_the_base_is_refused_by_name() -> None:
    with pytest.raises(RuntimeError, match="unfrozen after the base was sharded, and would not train"):
        fit(None, Recorded(), callbacks=(Thawing(),))
