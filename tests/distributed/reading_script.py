"""One rank of runs whose user reads or changes gradients between backward and step, under the strategies that spread."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.pytorch.utilities import grad_norm
from torch import Tensor, nn

from lightning_lora import FSDPLoRAStrategy, LoRAConfig, MegatronLoRAStrategy, inject
from lightning_lora.distributed.gradient_norm import total_norm
from lightning_lora.fabric import MegatronLoRAStrategy as FabricStrategy
from tests import models
from tests.distributed.ddp_script import rank_loader
from tests.distributed.fsdp_script import fit, state
from tests.distributed.launch import report
from tests.runs import LanguageModule

MAX_NORM = 0.05


def trained(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def by_hand(module: nn.Module) -> Any:
    return sum(p.grad.pow(2).sum() for p in trained(module)) ** 0.5


READINGS: dict[str, Callable[[nn.Module], Any]] = {
    "clip_grad_norm_": lambda module: nn.utils.clip_grad_norm_(trained(module), MAX_NORM),
    "not foreach": lambda module: nn.utils.clip_grad_norm_(trained(module), MAX_NORM, foreach=False),
    "get_total_norm": lambda module: nn.utils.get_total_norm([p.grad for p in trained(module)]),
    "grad_norm": lambda module: grad_norm(module, 2),
    "by hand": by_hand,
    "flat": lambda module: torch.cat([p.grad.flatten() for p in trained(module)]).norm(),
    "numpy": lambda module: [p.grad.detach().numpy() for p in trained(module)],
    "finite": lambda module: all(torch.isfinite(p.grad).all() for p in trained(module)),
}


class Reader(LanguageModule):
    """Does something to gradients before a step of SGD, which unlike Adam shows their scale."""

    read: Callable[[nn.Module], Any]
    where = "before"

    @classmethod
    def doing(cls, read: Callable[[nn.Module], Any]) -> Any:
        module = cls()  # its arguments would be hyperparameters
        module.read, module.found = read, []
        return module

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self.where == "before":
            self.found.append(self.read(self))

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.where == "after":
            self.found.append(self.read(self))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(trained(self), lr=1.0, momentum=0.9)


class Late(Reader):
    where = "after"


class Manual(Reader):
    """Runs backward past the strategy."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        self.model(input_ids=batch, labels=batch).loss.backward()
        self.read(self)
        optimizer.step()
        optimizer.zero_grad()


def scaled_by_rank(after: int) -> Callable[[Any], None]:
    """Scale gradients from some step on as a norm of a part would: by another number on every rank."""

    def scale(module: Any) -> None:
        if module.trainer.global_step >= after:
            for parameter in trained(module):
                parameter.grad.mul_(1.0 + 0.02 * module.trainer.global_rank)

    return scale


def clamped(module: nn.Module) -> None:
    nn.utils.clip_grad_value_(trained(module), 1e-3)


STRATEGIES: dict[str, Callable[[], Any]] = {
    "megatron_lora": lambda: MegatronLoRAStrategy(tensor_parallel_size=2),
    "fsdp_lora": lambda: "fsdp_lora",
}
IN_SHARDS = {"shard_adapters": True, "min_shard_numel": 1000}


def run(directory: Path, module: Reader, strategy: Any = "megatron_lora", **settings: Any) -> Reader:
    # ranks that share a model see the same batches
    data = rank_loader(0, 1) if strategy == "megatron_lora" else rank_loader(int(os.environ["RANK"]), 2)
    built = STRATEGIES[strategy]() if strategy in STRATEGIES else strategy
    fit(directory, module, built, loaders={"train_dataloaders": data}, **settings)
    return module


def error_of(act: Callable[..., Any], *arguments: Any, **settings: Any) -> str:
    try:
        act(*arguments, **settings)
    except (ValueError, RuntimeError) as error:
        return str(error)
    return "none"


def in_fabric(read: Callable[[nn.Module], Any]) -> None:
    fabric = Fabric(accelerator="cpu", devices=2, strategy=FabricStrategy(tensor_parallel_size=2))
    fabric.launch()
    model = inject(models.llama(), LoRAConfig(r=4))
    model, _ = fabric.setup(model, torch.optim.SGD(trained(model), lr=1.0))
    batch = models.token_ids(2, 8, seed=1)
    fabric.backward(model(input_ids=batch, labels=batch).loss)
    read(model)


def main(directory: Path) -> None:
    found: dict[str, Any] = {"drift": {}}
    no, one = directory / "no", {"limit_train_batches": 1}
    refused = {name: error_of(run, no, Reader.doing(read), **one) for name, read in READINGS.items()}
    refused["after the step"] = error_of(run, no, Late.doing(by_hand), **one)
    twice = {"limit_train_batches": 2, "accumulate_grad_batches": 2}
    refused["accumulating"] = error_of(run, no, Reader.doing(by_hand), **twice)
    refused["Fabric"] = error_of(in_fabric, READINGS["clip_grad_norm_"])
    beside = {"lora": {"modules_to_save": ["norm"]}, **one}  # a norm stays whole beside adapters in shards
    strategy = FSDPLoRAStrategy(**IN_SHARDS)
    refused["in shards"] = error_of(run, no, Reader.doing(READINGS["clip_grad_norm_"]), strategy, **beside)
    for name in STRATEGIES:
        refused[f"past {name}"] = error_of(run, no, Manual.doing(by_hand), name, **one)
        found["drift"][f"{name} at once"] = error_of(run, no, Reader.doing(scaled_by_rank(after=0)), name)
        last = scaled_by_rank(after=7)  # the last step of two epochs
        found["drift"][f"{name} late"] = error_of(run, directory / "late", Reader.doing(last), name, max_epochs=2)
    found["refused"] = refused
    # each rank has all of every tensor, and torch's own clipping is right
    alone = MegatronLoRAStrategy(tensor_parallel_size=1)
    found["clipped"] = state(run(directory / "one", Reader.doing(READINGS["clip_grad_norm_"]), alone))
    found["clamped"] = state(run(directory / "clamped", Reader.doing(clamped)))
    found["norms"] = [
        float(norm) for norm in run(directory / "norms", Reader.doing(lambda m: total_norm(m.parameters()))).found
    ]
    report(directory, found)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
