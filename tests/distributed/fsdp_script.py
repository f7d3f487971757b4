"""One rank of a Trainer run under ``fsdp_lora``, on the same global batches that one process would see."""

import copy
import os
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import BaseFinetuning, EarlyStopping, LearningRateFinder
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.model_summary import ModelSummary
from torch import Tensor

from lightning_lora import (
    FSDPLoRAStrategy,
    LoRACallback,
    disabled,
    merge,
    merged,
    save_peft,
    unmerge,
)
from lightning_lora.ops.sharded import is_sharded
from tests import models
from tests.distributed.counting import counted_collectives
from tests.distributed.launch import report
from tests.distributed.training import (
    BATCH,
    PROMPTS,
    SHARDED,
    Finetuned,
    Recorded,
    fit,
    optimizer_state,
    rank_loader,
    state,
)


class Watched(Recorded):
    """Notes what moves between ranks in each step, and generates texts of unequal lengths while it validates."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[Tensor] = []
        self.traffic: list[dict[str, list[int]]] = []

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        assert not torch.is_inference_mode_enabled()
        rank = self.trainer.global_rank
        text = self.model.generate(PROMPTS[rank : rank + 1, : 3 + rank % 2], max_new_tokens=2 + rank, do_sample=False)
        self.texts.append(text)
        with disabled(self.model):
            reference = self.model(input_ids=batch, labels=batch).loss
        self.log("reference", reference, sync_dist=True)
        self.log("val_loss", self.model(input_ids=batch, labels=batch).loss, sync_dist=True)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self._counting = counted_collectives()
        self.traffic.append(self._counting.__enter__())

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._counting.__exit__(None, None, None)


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


class SplitByColumns(Recorded):
    """Shards a weight by tensor parallelism, which ``fsdp_lora`` leaves to others."""

    def configure_model(self) -> None:
        from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

        plan = {"model.layers.0.mlp.up_proj": ColwiseParallel()}
        parallelize_module(self.model, self.device_mesh["data_parallel"], plan)


class Headed(Recorded):
    """A task head outside the pretrained model, with buffers, drawn differently on every rank."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(int(os.environ.get("RANK", 0)))
        self.head = torch.nn.Sequential(torch.nn.Linear(models.VOCAB, 4), torch.nn.BatchNorm1d(4))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.head(self.model(input_ids=batch).logits.flatten(0, 1)).square().mean()


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


class Quasi(Recorded):
    """Keeps an optimizer state that has no tensor in the shape of a parameter."""

    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS([p for p in self.parameters() if p.requires_grad], lr=0.01, max_iter=2)


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


def straight(directory: Path, rank: int, num_ranks: int) -> dict[str, Any]:
    """Two epochs with validation before and between, saved and read back."""
    module = Watched()
    loaders = {"val_dataloaders": rank_loader(rank, num_ranks)}
    trainer = fit(directory / "fsdp", module, FSDPLoRAStrategy(**SHARDED), loaders=loaders, max_epochs=2)
    found: dict[str, Any] = {
        "gradients": module.gradients,
        "functions": module.functions,
        "adapters": state(module),
        "losses": module.losses,
        "texts": module.texts,
        "traffic": [dict(step) for step in module.traffic],
        "val_loss": trainer.callback_metrics["val_loss"],
        "reference": trainer.callback_metrics["reference"],
        "sharded": sorted(name for name, p in module.named_parameters() if is_sharded(p)),
    }
    evaluating = (trainer.fit_loop.epoch_loop.val_loop, trainer.validate_loop, trainer.test_loop, trainer.predict_loop)
    found["inference_modes"] = [loop.inference_mode for loop in evaluating]
    with counted_collectives() as saving:
        trainer.save_checkpoint(directory / "again.ckpt")
    found["saving"] = dict(saving)
    summary = ModelSummary(module)
    found["parameters"] = (summary.total_parameters, summary.trainable_parameters)

    batch = models.token_ids(4, 8, seed=2)
    with torch.no_grad():
        logits = module.model(batch).logits
        with merged(module):
            found["merged"] = module.model(batch).logits
        found["unmerged"], found["logits"] = module.model(batch).logits, logits
    save_peft(module.model, directory / "peft")
    predicting = pl.Trainer(
        accelerator="cpu", devices=num_ranks, strategy="fsdp_lora", logger=False, enable_progress_bar=False,
        callbacks=[LoRACallback(r=4)], use_distributed_sampler=False, enable_model_summary=False,
    )  # fmt: skip
    predicted = predicting.predict(module, torch.utils.data.DataLoader(batch, batch_size=4))
    found["predicted"] = predicted[0]
    trainer.fit_loop.max_epochs = 3
    trainer.fit(module, rank_loader(rank, num_ranks))
    found["third_epoch"] = module.losses[8:]
    with torch.no_grad():
        expected = module.model(batch).logits
        merge(module, remove=True)
        found["removed"] = (module.model(batch).logits, expected)
    return found


def resumed(directory: Path, rank: int, num_ranks: int) -> dict[str, Any]:
    """Files of this strategy, of DDP and of one process, resumed under this strategy and under DDP."""
    found: dict[str, Any] = {}
    fit(directory / "ddp", Recorded(), "ddp")
    for source in ("fsdp", "ddp", "single"):
        found[f"from_{source}"] = going_on(directory / source / "epoch=0.ckpt")
    module = Recorded()
    url = f"file://{directory}/fsdp/epoch=0.ckpt"  # a path for fsspec
    trainer = fit(None, module, ckpt_path=url, max_epochs=2)
    trainer.save_checkpoint(f"file://{directory}/url.ckpt")
    found["from_url"] = {"losses": module.losses}
    module = Recorded()
    fit(None, module, "ddp", max_epochs=2, ckpt_path=directory / "fsdp" / "epoch=0.ckpt")
    found["to_ddp"] = {"losses": module.losses, "adapters": state(module)}
    validating = Watched()
    fit(None, validating, ckpt_path=directory / "fsdp" / "epoch=1.ckpt", max_epochs=2)
    found["loaded"] = (state(validating), optimizer_state(validating))
    return found


def other_ranks(directory: Path, rank: int, num_ranks: int) -> dict[str, Any]:
    """The file of four ranks on two, and of two on four."""
    return going_on(directory.parent / f"{6 - num_ranks} ranks" / "fsdp" / "epoch=0.ckpt")


def going_on(path: Path) -> dict[str, Any]:
    """Train the second of two epochs."""
    module = Recorded()
    trainer = fit(None, module, ckpt_path=path, max_epochs=2)
    return {"losses": module.losses, "adapters": state(module), "step": trainer.global_step}


HEADED: dict[str, Any] = {
    "lora": {"modules_to_save": ["lm_head", "norm"]}, "gradient_clip_val": 0.05, "max_epochs": 2,
    "accumulate_grad_batches": 2,
}  # fmt: skip


def adapters_in_shards(directory: Path, rank: int, num_ranks: int) -> dict[str, Any]:
    """``shard_adapters=True`` with a trained head and trained norms, against the same with all of that whole."""
    found: dict[str, Any] = {}
    for name, shards in (("whole", False), ("sharded", True)):
        found[name] = headed_run(directory / f"{name}_adapters", shards)
    for source, shards in (("whole", True), ("sharded", False), ("sharded", True)):
        module = Recorded()
        strategy = FSDPLoRAStrategy(shard_adapters=shards, **SHARDED)
        fit(None, module, strategy, ckpt_path=directory / f"{source}_adapters" / "epoch=0.ckpt", **HEADED)
        found[f"{source}_into_{shards}"] = {"losses": module.losses, "adapters": state(module)}
    value = Recorded()
    fit(
        None, value, FSDPLoRAStrategy(shard_adapters=True), gradient_clip_val=1e-3,
        gradient_clip_algorithm="value", limit_train_batches=1,
    )  # fmt: skip
    found["clipped_by_value"] = state(value)
    return found


def quarters(directory: Path, rank: int, num_ranks: int) -> dict[str, Any]:
    """Adapters in shards of a row each, and two halves of the base on two pairs of ranks."""
    hybrid = Recorded()
    fit(None, hybrid, FSDPLoRAStrategy(replicate_size=2, **SHARDED), limit_train_batches=1)
    return {"sharded": headed_run(directory / "sharded_adapters", True), "hybrid": hybrid.gradients}


def headed_run(directory: Path, shards: bool) -> dict[str, Any]:
    """Train with a head and norms, and disable and merge what was trained."""
    module = Recorded()
    trainer = fit(directory, module, FSDPLoRAStrategy(shard_adapters=shards, **SHARDED), **HEADED)
    batch = models.token_ids(4, 8, seed=2)
    with torch.no_grad():
        after = module.model(batch).logits
        with disabled(module):
            base = module.model(batch).logits
        again = module.model(batch).logits
        merge(module)
        merged_logits = module.model(batch).logits
        unmerge(module)
    save_peft(module.model, directory / "peft")
    return {
        "spread": sum(is_sharded(parameter) for parameter in module.parameters() if parameter.requires_grad),
        "adapters": state(module), "disabled": base, "again": torch.equal(after, again), "logits": after,
        "merged": merged_logits, "steps": trainer.global_step, "losses": module.losses,
    }  # fmt: skip


def options(directory: Path, rank: int, num_ranks: int) -> dict[str, Any]:
    """The first gradients under every option that must not change them, and losses under those that round."""
    found: dict[str, Any] = {}
    exact = {
        "checkpointed": {"activation_checkpointing": True},
        "compiled": {"compile": "eager", "activation_checkpointing": True},
        "kept": {"reshard_after_forward": False},
        "offloaded": {"cpu_offload": True, **SHARDED},
        "named": {"shard_modules": ["LlamaMLP", "self_attn"]},
        "hybrid": {"replicate_size": 2, **SHARDED},  # on two ranks each holds the whole base
    }
    for name, settings in exact.items():
        module = Recorded()
        fit(None, module, FSDPLoRAStrategy(**settings), limit_train_batches=1)
        found[name] = module.gradients
    module = Finetuned()
    fit(None, module, limit_train_batches=1)
    found["manual"] = module.gradients
    found["norm"] = module.norms
    module = Sharding()
    fit(None, module, limit_train_batches=1)
    found["own"] = module.gradients
    module = OtherBase()
    fit(None, module, limit_train_batches=1)
    found["other base"] = module.gradients
    try:
        fit(None, SplitByColumns(), limit_train_batches=1)
    except ValueError as error:
        found["columns"] = str(error)
    module = Headed()
    trainer = fit(directory / "headed", module)
    found["headed"] = {name: value.clone() for name, value in module.head.state_dict().items()}
    found["saved_head"] = sorted(
        name for name in torch.load(directory / "headed" / "epoch=0.ckpt")["state_dict"] if "head." in name
    )
    accumulating = Watched()
    fit(None, accumulating, accumulate_grad_batches=2, gradient_clip_val=0.05)
    found["accumulated"], found["accumulated_traffic"] = state(accumulating), list(map(dict, accumulating.traffic))
    for precision in ("bf16-true", "bf16-mixed"):
        module = Recorded()
        with counted_collectives() as traffic:
            trainer = fit(directory / precision, module, FSDPLoRAStrategy(**SHARDED), precision=precision)
        found[precision] = {
            "losses": module.losses,
            "dtypes": sorted({str(p.dtype) for p in module.parameters() if p.requires_grad}),
            "base": sorted({str(p.dtype) for p in module.parameters() if not p.requires_grad}),
            "gathered_dtype": str(traffic.gathered_dtype),
            "steps": trainer.global_step,
        }
    return found


def company(directory: Path, rank: int, num_ranks: int) -> dict[str, Any]:
    """Other callbacks and tools around a run."""
    found: dict[str, Any] = {}
    module = Watched()
    loaders = {"val_dataloaders": rank_loader(rank, num_ranks)}
    stopping = EarlyStopping("val_loss", mode="max", patience=1)
    logger = CSVLogger(directory, name="logs", version=f"of_rank_{rank}")
    trainer = fit(directory / "stopped", module, loaders=loaders, callbacks=(stopping,), max_epochs=9, logger=logger)
    found["epochs"] = trainer.current_epoch

    class Tuned(Recorded):
        lr = 1e-2

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=self.lr)

    module = Tuned()
    before = {}

    class AfterTheSearch(LearningRateFinder):
        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            super().on_fit_start(trainer, pl_module)
            before.update(state(pl_module))

    fit(directory / "tuned", module, callbacks=(AfterTheSearch(num_training_steps=3, early_stop_threshold=None),))
    found["after_search"] = before
    found["lr"] = module.lr
    found["left_behind"] = [path.name for path in (directory / "tuned").iterdir() if path.name.startswith(".")]
    found["loaded"] = copy.deepcopy(state(Recorded.load_from_checkpoint(directory / "tuned" / "epoch=0.ckpt")))
    found["tuned"] = state(module)
    return found


def unusual(directory: Path, rank: int, num_ranks: int) -> dict[str, Any]:
    """Modules and optimizers that the strategy has less of a hold on."""
    found: dict[str, Any] = {}
    module = Unseeded()
    fit(None, module, limit_train_batches=3)
    whole = {name: value for name, value in module.named_parameters() if not is_sharded(value)}
    found["unseeded"] = {name: value.detach().clone() for name, value in whole.items()}
    for name, settings in {"whole": {}, "sharded": {}, "kept": {"reshard_after_forward": False}}.items():
        module, strategy = Alternating(), FSDPLoRAStrategy(shard_adapters=name != "whole", **settings, **SHARDED)
        fit(None, module, strategy, lora={"modules_to_save": ["lm_head"]})
        found[f"alternating, {name}"] = state(module)
    for shards in (False, True):
        module, strategy = Recorded(), FSDPLoRAStrategy(shard_adapters=shards, **SHARDED)
        settings = {"modules_to_save": ["norm", "lm_head"]}  # in bfloat16, beside adapters in float32
        fit(directory / f"two_dtypes_{shards}", module, strategy, lora=settings, precision="bf16-true")
        found[f"two_dtypes_{shards}"] = state(module)
    module = Quasi()
    fit(directory / "quasi", module, FSDPLoRAStrategy(shard_adapters=True, **SHARDED))
    found["quasi"] = state(module)
    for shards in (True, False):
        module, strategy = Quasi(), FSDPLoRAStrategy(shard_adapters=shards, **SHARDED)
        try:
            fit(None, module, strategy, ckpt_path=directory / "quasi" / "epoch=0.ckpt")
            found[f"quasi_{shards}"] = state(module)
        except ValueError as error:
            found[f"quasi_{shards}"] = str(error)

    class Thawing(BaseFinetuning):
        def freeze_before_training(self, pl_module: Any) -> None:
            pass

        def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
            self.unfreeze_and_add_param_group(pl_module.model.model.layers[1].mlp, optimizer)

    try:
        fit(None, Recorded(), callbacks=(Thawing(),))
    except RuntimeError as error:
        found["thawing"] = str(error)
    return found


PARTS = {
    part.__name__: part
    for part in (straight, resumed, other_ranks, adapters_in_shards, quarters, options, company, unusual)
}


if __name__ == "__main__":
    num_ranks, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    assert BATCH % num_ranks == 0
    report(Path(sys.argv[1]), PARTS[sys.argv[2]](Path(sys.argv[1]), rank, num_ranks))
