"""Fabric runs on the same global batches that one process would see, under ``megatron_lora`` where there are ranks."""

from collections.abc import Callable
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_lora import LoRAConfig, adapter_state_dict, inject, named_adapter_parameters
from lightning_lora.fabric import MegatronLoRAStrategy
from lightning_lora.ops.sharded import split_over, whole
from tests import models, runs
from tests.distributed.split import four_heads
from tests.distributed.training import BATCH, rank_of


def start(strategy: Any = None, plugins: Any = None, **options: Any) -> Fabric:
    """Launch Fabric on all ranks; on one process without a strategy."""
    _, num_ranks = rank_of()
    if strategy is None:
        strategy = MegatronLoRAStrategy(**options) if num_ranks > 1 else "auto"
    fabric = Fabric(accelerator="cpu", devices=num_ranks, strategy=strategy, plugins=plugins)
    fabric.launch()
    return fabric


def make(build: Callable[[], nn.Module] = four_heads, **optimizer: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = inject(build().train(), LoRAConfig(r=4))
    models.fill_adapters(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    return model, torch.optim.AdamW(trained, lr=1e-2, eps=1e-4, **optimizer)


def batches(fabric: Fabric) -> Any:
    """Return what Fabric deals out of batches that are ``BATCH`` rows over all ranks."""
    kwargs = getattr(fabric.strategy, "distributed_sampler_kwargs", None) or {"num_replicas": 1}
    rows = models.token_ids(runs.ROWS, 8, seed=1)
    return fabric.setup_dataloaders(DataLoader(rows, batch_size=BATCH // kwargs["num_replicas"]))


def loss_of(model: Any, batch: Tensor) -> Tensor:
    return model(input_ids=batch, labels=batch).loss


def gradients(model: Any) -> dict[str, Tensor | None]:
    """Return every adapter's gradient as anyone reads it, parts put together."""
    found: dict[str, Tensor | None] = {}
    for name, parameter in named_adapter_parameters(model.module):
        gradient = None if parameter.grad is None else parameter.grad.clone()
        if gradient is not None and hasattr(parameter, "lora_split"):
            split_over(gradient, *parameter.lora_split)
        found[name] = None if gradient is None else whole(gradient).clone()
    return found


def adapters(model: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in adapter_state_dict(model.module).items()}


def step(fabric: Fabric, model: Any, optimizer: Any, batch: Tensor) -> Tensor:
    loss = loss_of(model, batch)
    fabric.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    return fabric.all_reduce(loss.detach())
