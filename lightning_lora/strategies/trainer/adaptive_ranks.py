"""AdaLoRA in a Trainer's run: add its loss term to the gradients, and prune ranks after each optimizer step."""

import math
from dataclasses import asdict
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.rank_zero import rank_zero_info
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn
from torch.optim import Optimizer

from lightning_lora.adalora import AdaLoRA
from lightning_lora.model.rank_allocator import RankAllocator
from lightning_lora.model.state import require_injection

_ORTHOGONALITY, _RANK = "train/adalora_orthogonality", "train/adalora_rank"


class AdaptiveRanks:
    """Runs a :class:`RankAllocator` for one callback. Without AdaLoRA it does nothing.

    The loss term is added to the gradients after the first backward of each optimizer step: before clipping, scaled as
    the loss is, and once, however many batches are accumulated. Ranks are pruned inside the optimizer's step, as its
    last act: a step that the ``GradScaler`` skips does not count.
    """

    def __init__(self) -> None:
        self.allocator: RankAllocator | None = None
        self._loaded: dict[str, Any] | None = None  # of a checkpoint, until training starts
        self._hook: Any = None
        self._has_pruned = False  # since ranks were logged

    def start(self, trainer: "pl.Trainer", root: nn.Module) -> None:
        """Begin a schedule, or go on with that of a checkpoint or of the run before.

        Raises:
            ValueError: the schedule does not fit the run, or differs from the checkpoint's.
        """
        settings, state = require_injection(root).config.adalora, self._loaded
        self._loaded = None
        self.stop()
        if settings is None:
            self.allocator = None
            return
        if state is not None:
            _check_same(settings, state)
            self.allocator = RankAllocator(root, settings, state["total_step"])
            self.allocator.load_state_dict(state)
        elif trainer.global_step == 0:
            self.allocator = RankAllocator(root, settings, settings.total_step or _estimated_steps(trainer))
        elif self.allocator is None:
            raise ValueError(
                f"the run goes on at step {trainer.global_step}, and its checkpoint holds no state of AdaLoRA: it was "
                "written without LoRACallback(adalora=...), or by a callback for another module=. To start a new run "
                "from its weights, give it to init_from= instead of ckpt_path="
            )
        require_injection(root).total_step = self.allocator.total_step
        self._hook = _optimizer_of(trainer, self.allocator).register_step_post_hook(self._after_step)
        _say_if_shorter(trainer, self.allocator)

    def stop(self) -> None:
        """Stop watching the optimizer."""
        if self._hook is not None:
            self._hook.remove()
        self._hook = None

    def before_backward(self) -> None:
        """Note whether the backward begins a new sum of gradients."""
        if self._hook is not None and self.allocator is not None and not self.allocator.has_gradient:
            self.allocator.is_regularized = False

    def regularize(self, pl_module: "pl.LightningModule", scaler: Any = None) -> None:
        """Add the loss term to the gradients, if it is not in them yet, and log its value.

        Args:
            scaler: the ``GradScaler`` that scaled the loss and has not unscaled the gradients yet.
        """
        allocator = self.allocator
        if self._hook is None or allocator is None or allocator.is_regularized or not allocator.trains:
            return
        value = allocator.add_regularizer(None if scaler is None else scaler.scale)
        pl_module.log(_ORTHOGONALITY, value)

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        """Prune, unless the optimizer itself skipped the step (fused ones unscale, and skip, inside)."""
        assert self.allocator is not None
        found_inf, scale = getattr(optimizer, "found_inf", None), getattr(optimizer, "grad_scale", None)
        if found_inf is not None and bool(found_inf):
            self.allocator.is_regularized = False
            return
        self.allocator.after_step(scale)
        self._has_pruned = True

    def log(self, pl_module: "pl.LightningModule") -> None:
        """Log the average rank after a step."""
        if self._has_pruned and self.allocator is not None:
            pl_module.log(_RANK, self.allocator.mean_rank)
        self._has_pruned = False

    def finish(self) -> None:
        """Warn if the run ended before the ranks reached their last number."""
        self.stop()
        if self.allocator is not None and not self.allocator.is_finished:
            rank_zero_warn(
                f"the run ended after {self.allocator.step} steps, and AdaLoRA prunes up to step "
                f"{self.allocator.last} of total_step={self.allocator.total_step}: the layers have not reached their "
                "ranks. Go on with ckpt_path=, or give the number of steps that the run has as total_step"
            )

    def state(self) -> dict[str, Any] | None:
        """Return what a checkpoint has to hold; ``None`` without AdaLoRA."""
        if self.allocator is None:
            return self._loaded
        return {"settings": asdict(self.allocator.settings), **self.allocator.state_dict()}

    def load(self, state: dict[str, Any] | None) -> None:
        """Take the state of a checkpoint, with which :meth:`start` goes on."""
        self._loaded = state


def _estimated_steps(trainer: "pl.Trainer") -> int:
    """Return the number of optimizer steps of the whole run."""
    steps = trainer.estimated_stepping_batches
    if not math.isfinite(steps) or steps < 1:
        raise ValueError(
            "AdaLoRA prunes over the whole run, and this Trainer does not know how many steps it has: set max_steps, "
            "or give AdaLoRA(total_step=...)"
        )
    return int(steps)


def _say_if_shorter(trainer: "pl.Trainer", allocator: RankAllocator) -> None:
    if 0 < trainer.max_steps < allocator.last:
        rank_zero_info(
            f"AdaLoRA prunes up to step {allocator.last} of total_step={allocator.total_step}, and this run ends at "
            f"max_steps={trainer.max_steps}: go on with ckpt_path= to reach the last ranks"
        )


def _optimizer_of(trainer: "pl.Trainer", allocator: RankAllocator) -> Optimizer:
    """Return the optimizer that holds the factors, whose steps are counted."""
    factors = {id(p) for layer in allocator.layers.values() for _, p in layer.named_adapter_tensors()}
    holding = [
        optimizer
        for optimizer in trainer.optimizers
        if any(id(parameter) in factors for group in optimizer.param_groups for parameter in group["params"])
    ]
    if len(holding) != 1:
        raise ValueError(
            f"AdaLoRA counts the steps of the optimizer that trains its layers, and {len(holding)} of "
            f"{len(trainer.optimizers)} optimizers do: give all of their lora_A, lora_B and lora_E to one"
        )
    return holding[0]


def _check_same(settings: AdaLoRA, state: dict[str, Any]) -> None:
    """Raise ``ValueError`` where a checkpoint's schedule is another one."""
    given, there = asdict(settings), {**state["settings"]}
    if settings.total_step is None:  # the checkpoint's counts
        given["total_step"] = there["total_step"]
    elif there["total_step"] is None:
        there["total_step"] = state["total_step"]
    changed = ", ".join(
        f"{key}={given[key]!r} (there: {there.get(key)!r})" for key in given if given[key] != there.get(key)
    )
    if changed:
        raise ValueError(f"the checkpoint's AdaLoRA has other settings: {changed}. Give those that it was written with")
