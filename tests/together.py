"""Runs of several named adapters on one base, and of each of them alone on the same rows."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from lightning_lora import (
    AdapterSchedules,
    LoRACallback,
    LoRAConfig,
    active,
    adapters,
    losses_by_adapter,
    named_adapter_parameters,
    parameter_groups,
)
from lightning_lora.ops.sharded import split_over, whole
from tests import models

# the adapters of each pair of rows; what a rank sees of one adapter is as much as any other rank that sees it
KINDS = {
    "all": [["law", "medicine"]] * 4,
    "apart": [["law", "code"]] * 2 + [["law", "medicine"]] * 2,
    "halves": [["law", "law"]] * 2 + [["medicine", "medicine"]] * 2,
    "with base": [["medicine", None]] * 2 + [["law", None]] * 2,
    "one": [["code", "code"]] * 4,
    "two": [["law", "code"]] * 4,
}
STEPS = ["all", "apart", "halves", "with base", "one", "all", "apart", "halves", "with base", "two"]
RATES = {"law": 1e-2, "medicine": 3e-3, "code": 2e-2}
DECAY = {"law": 0.1, "medicine": 0.0, "code": 0.3}
CLIP = {"law": 0.02, "code": 0.05}  # the gradients' norms are above
WARM_UP = {"law": 3, "medicine": 5, "code": 2}
STEPS_OF = {name: sum(any(name in pair for pair in KINDS[kind]) for kind in STEPS) for name in RATES}


def configs(**more: Any) -> dict[str, LoRAConfig]:
    """Adapters of other ranks, scales and targets, whose B does not start at zero."""
    more = {"init": "gaussian", **more}
    return {
        "law": LoRAConfig(r=4, **more),
        "medicine": LoRAConfig(r=8, alpha=4, target_modules=["q_proj", "v_proj", "up_proj"], **more),
        "code": LoRAConfig(r=2, target_modules=["gate_proj", "up_proj", "down_proj", "o_proj"], **more),
    }


def batches(rank: int = 0, num_ranks: int = 1, only: str | None = None) -> list[dict[str, Any]]:
    """Return a rank's rows of every step, and the adapters of those rows; ``only`` those of one adapter."""
    found = []
    for step, kind in enumerate(STEPS):
        pairs, ids = KINDS[kind], models.token_ids(8, 6, seed=step)
        mine = range(rank * 4 // num_ranks, (rank + 1) * 4 // num_ranks)
        rows = [(ids[2 * pair + place], pairs[pair][place]) for pair in mine for place in range(2)]
        rows = [(row, name) for row, name in rows if only in (None, name)]
        if rows:
            found.append({"ids": torch.stack([row for row, _ in rows]), "adapter": [name for _, name in rows]})
    return found


class Together(pl.LightningModule):
    """Trains whatever adapters it has on the rows that name them, and keeps what each step was made of."""

    def __init__(self, model: nn.Module, exact: bool = False) -> None:
        super().__init__()
        self.model, self.exact = model, exact
        self.losses: dict[str, list[float]] = {}
        self.gradients: dict[str, list[Tensor]] = {}

    def per_token(self, ids: Tensor) -> Tensor:
        """Return the loss of each token, ``[rows, tokens - 1]``."""
        return loss_per_token(self.model(input_ids=ids).logits[:, :-1], ids)

    def training_step(self, batch: dict[str, Any]) -> Tensor:
        names = batch["adapter"]
        alone = len(adapters(self.model)) == 1
        with active(self.model, names[0]) if alone else active(self.model, names, exact=self.exact):
            losses = losses_by_adapter(self.per_token(batch["ids"]), names)
        for name, loss in losses.items():
            self.losses.setdefault(str(name), []).append(loss.item())
        return torch.stack([*losses.values()]).sum()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        for name, parameter in named_adapter_parameters(self):
            if parameter.grad is not None:
                self.gradients.setdefault(name, []).append(gathered(parameter, parameter.grad))

    def configure_optimizers(self) -> Any:
        names = list(adapters(self.model))
        rates, decay = ({name: numbers[name] for name in names} for numbers in (RATES, DECAY))
        groups = parameter_groups(self, rates, lora_plus_ratio=2.0, weight_decay=decay)
        optimizer = torch.optim.AdamW(groups, eps=1e-2)
        schedules = AdapterSchedules(optimizer, {name: warming_up(WARM_UP[name]) for name in names})
        return [optimizer], [{"scheduler": schedules, "interval": "step"}]


def loss_per_token(logits: Tensor, ids: Tensor) -> Tensor:
    losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return losses.view_as(ids[:, 1:])


def warming_up(steps: int) -> Callable[[torch.optim.Optimizer], LambdaLR]:
    return lambda groups: LambdaLR(groups, lambda step: min((step + 1) / steps, 1.0))


def gathered(parameter: Any, tensor: Tensor) -> Tensor:
    """Return a tensor that lies as the parameter does, whole."""
    value = tensor.detach().clone()
    if hasattr(parameter, "lora_split"):
        split_over(value, *parameter.lora_split)
    return whole(value).clone()


def fit(
    module: pl.LightningModule,
    named: Mapping[str, LoRAConfig],
    data: Sequence[Any],
    strategy: Any = "auto",
    devices: int = 1,
    callbacks: Sequence[Any] = (),
    **settings: Any,
) -> pl.Trainer:
    """Train one epoch of ready batches."""
    ckpt_path = settings.pop("ckpt_path", None)
    clip_norm = {name: norm for name, norm in CLIP.items() if name in named}
    lora = LoRACallback(**{"adapters": dict(named), "clip_norm": clip_norm, **settings.pop("lora", {})})
    trainer = pl.Trainer(
        accelerator="cpu", devices=devices, strategy=strategy, use_distributed_sampler=False, logger=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[lora, *callbacks],
        **{"max_epochs": 1, "enable_checkpointing": False, **settings},
    )  # fmt: skip
    trainer.fit(module, DataLoader(data, batch_size=None), ckpt_path=ckpt_path)
    return trainer


def outcome(module: Together) -> dict[str, Any]:
    """Return what a run came to: values, every gradient, moments, steps, rates and losses, by adapter."""
    optimizer = module.trainer.optimizers[0]
    found: dict[str, Any] = {name: {"loss": module.losses[name]} for name in adapters(module.model)}
    for full_name, parameter in named_adapter_parameters(module):
        layer, _, rest = full_name.partition(".lora.")
        adapter, _, local = rest.partition(".")
        state = {
            key: gathered(parameter, value) if value.ndim else value
            for key, value in optimizer.state[parameter].items()
        }
        value = gathered(parameter, parameter)
        found[adapter][f"{layer}.{local}"] = [value, state, module.gradients[full_name]]
    for group in optimizer.param_groups:
        found[group["adapter"]][group["name"]] = group["lr"]
    return found


def alone(build: Callable[[], nn.Module], named: Mapping[str, LoRAConfig], **options: Any) -> dict[str, Any]:
    """Return :func:`outcome` of a run for each adapter on its own rows alone, in one process."""
    found = {}
    for name, config in named.items():
        module = Together(build(), **options)
        fit(module, {name: config}, batches(only=name))
        found |= outcome(module)
    return found
