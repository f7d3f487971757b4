"""One rank of a Trainer run under ``megatron_lora``, on the same global batches that one process would see."""

import os
import pathlib
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_lora import LoRACallback, MegatronLoRAStrategy, disabled, merge, merged, save_peft, unmerge
from lightning_lora.distributed.gradient_norm import total_norm
from lightning_lora.ops.sharded import is_sharded
from tests import models
from tests.distributed.counting import counted_collectives
from tests.distributed.fsdp_meta_script import on_meta
from tests.distributed.launch import report
from tests.distributed.split import SPLIT, AfterTheSearch, AtMidway, Module, four_heads, run, whole_factors
from tests.distributed.training import Finetuned, fit, rank_loader, state


class Steps(Finetuned):
    def __init__(self) -> None:
        super().__init__()
        self.model = four_heads()

    def norm(self) -> float:
        return total_norm(self.parameters()).item()


class MixedSteps(Finetuned):
    """Runs one of two backwards before a step itself, past the strategy."""

    def __init__(self, order: str) -> None:
        super().__init__()
        self.model, self.order = four_heads(), order

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        optimizer = self.optimizers()
        for is_raw in (True, False) if self.order == "raw first" else (False, True):
            loss = self.model(input_ids=batch, labels=batch).loss / 2
            loss.backward() if is_raw else self.manual_backward(loss)
        optimizer.step()
        optimizer.zero_grad()


class Lazy(Module):
    def __init__(self, directory: str) -> None:
        super().__init__()
        self.directory = directory
        self.model: Any = None

    def configure_model(self) -> None:
        from transformers import AutoModelForCausalLM

        if self.model is None:
            with torch.device("meta"):
                self.model = on_meta(AutoModelForCausalLM, Path(self.directory))


def training(directory: Path, num_ranks: int) -> dict[str, Any]:
    """Two epochs on every number of tensor-parallel ranks."""
    found: dict[str, Any] = {}
    for size in sorted({2, num_ranks}):
        trainer, module = run(directory / f"tp{size}", size, max_epochs=2)
        found[f"tp{size}"] = {
            "gradients": module.gradients, "adapters": state(module), "losses": module.losses,
            "traffic": module.traffic[-1], "texts": module.texts[-1], "functions": module.functions,
            "raw": whole_factors(module),
            "split": sorted(n for n, p in module.named_parameters() if is_sharded(p)),
        }  # fmt: skip
        batch = models.token_ids(4, 8, seed=2)
        with counted_collectives() as saving:
            trainer.save_checkpoint(directory / f"again{size}.ckpt")
        found[f"tp{size}"]["saving"] = dict(saving)
        with torch.no_grad():
            logits = module.model(batch).logits
            with merged(module):
                inside = module.model(batch).logits
            again = module.model(batch).logits
            merge(module)
            unmerge(module)
        found[f"tp{size}"]["merging"] = (logits, inside, again)
        save_peft(module.model, directory / f"peft{size}")
    return found


def steps(directory: Path, num_ranks: int) -> dict[str, Any]:
    """Clipped and accumulated steps, and steps of the module's own; two ranks share a model."""
    found: dict[str, Any] = {}
    _, clipped = run(None, 2, gradient_clip_val=0.05, accumulate_grad_batches=2, validates=False)
    found["clipped"] = state(clipped)
    for order in ("raw first", "raw last"):
        _, mixed = run(None, 2, MixedSteps(order), validates=False)
        found[order] = state(mixed)
    _, manual = run(None, 2, Steps(), limit_train_batches=1, validates=False)
    found["manual"] = manual.gradients
    return found


def dropout(directory: Path, num_ranks: int) -> tuple[list[float], dict[str, Tensor]]:
    pl.seed_everything(7, verbose=False)
    _, dropped = run(None, num_ranks, lora={"dropout": 0.3}, validates=False)
    return dropped.losses, whole_factors(dropped)


def families(directory: Path, num_ranks: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in SPLIT:
        _, module = run(None, 2, Module(name), limit_train_batches=2, validates=False)
        found[name] = {"gradients": module.gradients, "losses": module.losses, "adapters": state(module)}
    plan = {"encoder.layer.*.intermediate.dense": "colwise", "encoder.layer.*.output.dense": "rowwise"}
    _, module = run(None, 2, Module("bert"), limit_train_batches=2, options={"plan": plan}, validates=False)
    split = [name for name, parameter in module.named_parameters() if is_sharded(parameter)]
    found["planned"] = {"losses": module.losses, "adapters": state(module), "split": split}
    _, module = run(None, 2, Lazy(str(directory / "saved")), limit_train_batches=1, validates=False)
    found["meta"] = module.gradients
    return found


def files(directory: Path, num_ranks: int) -> dict[str, Any]:
    """Files of other strategies under this one, and this one's under others."""
    found: dict[str, Any] = {}
    fsdp = Module()
    rank = int(os.environ["RANK"])
    data = {"train_dataloaders": rank_loader(rank, num_ranks)}
    fit(directory / "fsdp", fsdp, "fsdp_lora", loaders=data)
    fit(directory / "ddp", Module(), "ddp", loaders=data)
    for source in ("tp2", "fsdp", "ddp", "single"):
        found[f"from {source}"] = resumed(directory / source)
    module, path = Module(), directory / "tp2" / "epoch=0.ckpt"
    fit(None, module, "fsdp_lora", max_epochs=2, loaders=data, ckpt_path=path)
    found["to fsdp"] = {"adapters": state(module)}
    return found


def replicas(directory: Path, num_ranks: int) -> dict[str, Any]:
    """Files of one process and of four parts, on two replicas of two parts."""
    return {f"from {source}": resumed(directory / source) for source in ("tp4", "single")}


def resumed(written: Path) -> dict[str, Any]:
    """Go on from the first epoch's file, two ranks to a model."""
    module, midway = Module(), AtMidway()
    run(None, 2, module, ckpt_path=written / "epoch=0.ckpt", max_epochs=2, callbacks=(midway,))
    names = {id(p): n for n, p in module.named_parameters()}
    optimizer = module.trainer.optimizers[0]
    return {
        "losses": module.losses, "adapters": state(module), "moments": midway.moments,
        "order": [names[id(p)] for group in optimizer.param_groups for p in group["params"]],
    }  # fmt: skip


class Tuned(Module):
    lr = 1e-2

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=self.lr, eps=1e-4)

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.model(input_ids=batch).logits


def company(directory: Path, num_ranks: int) -> dict[str, Any]:
    """Tools around a run, and a second one."""
    found: dict[str, Any] = {}
    module, search = Tuned(), AfterTheSearch(num_training_steps=3, early_stop_threshold=None)
    trainer, _ = run(directory / "searched", 2, module, callbacks=(search,))
    found["after_search"] = search.adapters
    batch = models.token_ids(4, 8, seed=2)
    with torch.no_grad():
        expected = module.model(batch).logits
        with disabled(module):
            found["disabled"] = module.model(batch).logits
    predicting = pl.Trainer(
        accelerator="cpu", devices=num_ranks, strategy="megatron_lora", logger=False, enable_progress_bar=False,
        callbacks=[LoRACallback(r=4)], use_distributed_sampler=False, enable_model_summary=False,
    )  # fmt: skip
    predicted = predicting.predict(module, torch.utils.data.DataLoader(batch, batch_size=4))
    found["predicted"] = (predicted[0], expected)
    trainer.fit_loop.max_epochs = 2
    replicas = num_ranks // 2
    trainer.fit(module, rank_loader(int(os.environ["RANK"]) // 2, replicas))
    found["steps"] = len(module.losses)
    with torch.no_grad():
        before = module.model(batch).logits
        merge(module, remove=True)
        found["removed"] = (module.model(batch).logits, before)
    return found


def refusals(directory: Path, num_ranks: int) -> dict[str, str]:
    cases: dict[str, dict[str, Any]] = {
        "word": {"options": {"plan": {"layers.*.self_attn.q_proj": "columnwise"}}},
        "name": {"options": {"plan": {"layers.*.self_attn.query": "colwise"}}},
        "sequence": {"options": {"sequence_parallel": True}},
        "dora": {"lora": {"use_dora": True}},
        "no plan": {"module": Module("gpt2")},
        "trained": {"lora": {"modules_to_save": ["down_proj"], "target_modules": ["q_proj"]}},
        "tied": {"module": Module("tied llama"), "lora": {"target_modules": ["embed_tokens"]}},
        "batches": {"data": rank_loader(int(os.environ["RANK"]), num_ranks)},
    }
    again, removed = Module(), Module()
    for module in (again, removed):
        run(None, 2, module, limit_train_batches=1, max_epochs=1, validates=False)
    merge(removed, remove=True)
    cases["size"] = {"module": again, "size": 1}
    cases["removed"] = {"module": removed}
    found: dict[str, str] = {}
    for name, case in cases.items():
        size, module = case.pop("size", 2), case.pop("module", None)
        data = case.pop("data", None)
        try:
            if data is not None:
                strategy = MegatronLoRAStrategy(tensor_parallel_size=2)
                fit(None, Module(), strategy, loaders={"train_dataloaders": data})
            else:
                run(None, size, module, limit_train_batches=1, **case)
        except ValueError as error:
            found[name] = str(error)
    return found


def heads(directory: Path, num_ranks: int) -> str:
    try:
        run(None, num_ranks, Module("qwen3"), limit_train_batches=1)
    except ValueError as error:
        return str(error)
    return "nothing was refused"


def safety(directory: Path, num_ranks: int) -> tuple[bool, bool]:
    """Return whether Megatron-core is imported, and whether a safe load may build what it allows by itself."""
    MegatronLoRAStrategy()
    return "megatron.core" in sys.modules, pathlib.PosixPath in torch.serialization.get_safe_globals()


PARTS = {
    part.__name__: part
    for part in (training, steps, dropout, families, files, replicas, company, refusals, heads, safety)
}


if __name__ == "__main__":
    report(Path(sys.argv[1]), PARTS[sys.argv[2]](Path(sys.argv[1]), int(os.environ["WORLD_SIZE"])))
