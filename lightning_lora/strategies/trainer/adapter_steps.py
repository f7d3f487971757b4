"""Clip and accumulate the gradients of each named adapter apart, and stop adapters one by one."""

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_info
from lightning.pytorch.callbacks import Callback, EarlyStopping
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_lora.model.own_parameters import freeze, owners
from lightning_lora.ops.guarded import bare

HELD, NUM_HELD = "lora_held", "lora_num_held"  # in an optimizer's state


class AdapterSteps(Callback):
    """Base of ``LoRACallback`` that does what ``clip_norm`` and ``accumulate`` ask for, before each optimizer step."""

    clip_norm: dict[str, float]
    accumulate: dict[str, int]

    @override
    def on_before_optimizer_step(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", optimizer: Optimizer
    ) -> None:
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        if self.accumulate:
            accumulate(optimizer, owners(pl_module), self.accumulate)
        if self.clip_norm:
            trainer.strategy.clip_apart(optimizer, self.clip_norm)  # type: ignore[attr-defined]  # of AdapterOnly


@torch.no_grad()
def accumulate(optimizer: Optimizer, owner: Mapping[int, str], numbers: Mapping[str, int]) -> None:
    """Keep an adapter's gradients back until there are ``numbers[name]`` of them, and give the optimizer their mean.

    Until then they lie in the optimizer's state, which checkpoints hold, and the adapter takes no step.

    Args:
        owner: the adapter of each parameter, by identity.
    """
    members: dict[str, list[nn.Parameter]] = {name: [] for name, number in numbers.items() if number > 1}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            members.get(owner.get(id(parameter), ""), []).append(parameter)
    for name, parameters in members.items():
        if not any(parameter.grad is not None for parameter in parameters):
            continue  # it had no rows
        held = [optimizer.state[one] for one in parameters if HELD in optimizer.state.get(one, ())]
        num_held = int(held[0][NUM_HELD]) if held else 0
        for parameter in parameters:
            _hold(optimizer, parameter, num_held + 1, numbers[name])


def _hold(optimizer: Optimizer, parameter: nn.Parameter, number: int, wanted: int) -> None:
    """Add a gradient to those that are kept back, and give their mean back once they are ``wanted``."""
    state: dict[str, Any] = optimizer.state[parameter]
    total: Tensor | None = state.pop(HELD, None)
    state.pop(NUM_HELD, None)
    if parameter.grad is not None:
        own = bare(parameter.grad) / wanted
        total = own if total is None else total.add_(own)
    parameter.grad = total if number == wanted else None
    if number < wanted and total is not None:
        state.setdefault("step", torch.tensor(0.0))  # torch's optimizers load no state without it
        state.update({HELD: total, NUM_HELD: torch.tensor(float(number))})
    elif state.keys() <= {"step"}:
        del optimizer.state[parameter]  # they fill a state that is not there


class AdapterEarlyStopping(EarlyStopping):
    """Lightning's ``EarlyStopping`` for one named adapter: it stops to train, and the run ends with the last of them.

    Args:
        adapter: its name.
        monitor, arguments: as of ``EarlyStopping``.

    Example::

        AdapterEarlyStopping("law", monitor="val_loss/law", patience=3)
    """

    def __init__(self, adapter: str, monitor: str, **arguments: Any) -> None:
        super().__init__(monitor, **arguments)
        self.adapter, self.has_stopped = adapter, False

    @property
    @override
    def state_key(self) -> str:
        return f"{super().state_key}{ {'adapter': self.adapter} }"

    @override
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "has_stopped": self.has_stopped}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.has_stopped = state_dict["has_stopped"]

    @override
    def on_train_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        super().on_train_start(trainer, pl_module)
        if self.has_stopped:
            freeze(pl_module, self.adapter)

    @override
    def on_validation_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        former = trainer.should_stop
        if not self.has_stopped:
            super().on_validation_end(trainer, pl_module)
            self._stop_adapter(trainer, pl_module, former)

    @override
    def on_train_epoch_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        former = trainer.should_stop
        if not self.has_stopped:
            super().on_train_epoch_end(trainer, pl_module)
            self._stop_adapter(trainer, pl_module, former)

    def _stop_adapter(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", former: bool) -> None:
        """Freeze the adapter where Lightning's code would end the run."""
        if former or not trainer.should_stop:
            return
        self.has_stopped = True
        freeze(pl_module, self.adapter)
        rank_zero_info(f"adapter {self.adapter!r} stops at step {trainer.global_step}")
        trainer.should_stop = not any(parameter.requires_grad for parameter in pl_module.parameters())
