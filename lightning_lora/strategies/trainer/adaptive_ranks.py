"""AdaLoRA in a Trainer's run: add its loss term to the gradients, and prune ranks after each optimizer step."""

import math
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.rank_zero import rank_zero_info
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_lora.adalora import AdaLoRA
from lightning_lora.model.families import find_root
from lightning_lora.model.rank_allocator import RankAllocator
from lightning_lora.model.state import require_injection


class AdaptiveRanks(Callback):
    """Base of ``LoRACallback`` that runs AdaLoRA's :class:`RankAllocator`. Without AdaLoRA it does nothing.

    The loss term is added to the gradients after the first backward of each optimizer step: before clipping, scaled as
    the loss is, and once, however many batches are accumulated. Ranks are pruned inside the optimizer's step, as its
    last act: a step that the ``GradScaler`` skips does not count.
    """

    module: str | None  # name of the pretrained model
    _allocator: RankAllocator | None = None
    _loaded: dict[str, Any] | None = None  # state of a checkpoint, until training starts
    _hook: Any = None  # on the optimizer, while training runs
    _has_stepped = False  # since ranks were logged

    def rank_history(self) -> tuple[list[int], dict[str, list[int]]]:
        """Return steps, and how many ranks each adapted layer kept after those, by its name.

        A run of more than 500 steps notes some of them, and the last pruning.

        Raises:
            ValueError: no run has trained with ``adalora=AdaLoRA(...)``.
        """
        if self._allocator is None:
            raise ValueError("no run of this callback has pruned ranks: give adalora=AdaLoRA(...) and call fit")
        return self._allocator.history()

    @override
    def state_dict(self) -> dict[str, Any]:
        if self._allocator is None:
            return {} if self._loaded is None else {"adalora": self._loaded}
        return {"adalora": {"settings": asdict(self._allocator.settings), **self._allocator.state_dict()}}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = state_dict.get("adalora")

    @override
    def setup(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        self._loaded = None  # of a run that failed before it trained

    @override
    def on_train_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Begin a schedule, or go on with that of a checkpoint or of the run before.

        Raises:
            ValueError: the schedule does not fit the run, or differs from the checkpoint's.
        """
        _, root = find_root(pl_module, self.module)
        config = require_injection(root).configs.get("")  # an adapter with a name has no AdaLoRA
        settings, state, self._loaded = None if config is None else config.adalora, self._loaded, None
        self._stop()
        if settings is None:
            self._allocator = None
            return
        if state is not None:
            _check_same(settings, state)
            self._allocator = RankAllocator(root, settings, state["total_step"])
            self._allocator.load_state_dict(state)
        elif trainer.global_step == 0:
            self._allocator = RankAllocator(root, settings, settings.total_step or _num_steps(trainer, settings))
        elif self._allocator is None:
            raise ValueError(
                f"the run goes on at step {trainer.global_step}, and its checkpoint holds no state of AdaLoRA: it was "
                "written without LoRACallback(adalora=...), or by a callback for another module=. To start a new run "
                "from its weights, give it to init_from= instead of ckpt_path="
            )
        require_injection(root).total_step = self._allocator.total_step
        self._hook = _optimizer_of(trainer, self._allocator).register_step_post_hook(self._after_step)
        _say_if_shorter(trainer, self._allocator)

    @override
    def on_before_backward(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", loss: Tensor) -> None:
        if self._hook is not None and self._allocator is not None and not self._allocator.has_gradient:
            self._allocator.is_regularized = False  # a new sum of gradients begins

    @override
    def on_after_backward(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        self._regularize(pl_module, None if scaler is None else scaler.scale)

    @override
    def on_before_optimizer_step(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", optimizer: Optimizer
    ) -> None:
        if not pl_module.automatic_optimization:  # the user may call loss.backward(), which Lightning does not see
            self._regularize(pl_module, None)

    def _regularize(self, pl_module: "pl.LightningModule", scale: Callable[[Tensor], Tensor] | None) -> None:
        """Add the loss term to the gradients, if it is not in them yet, and log its value."""
        allocator = self._allocator
        if self._hook is not None and allocator is not None and allocator.trains and not allocator.is_regularized:
            pl_module.log("train/adalora_orthogonality", allocator.add_regularizer(scale))

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        """Prune, unless the optimizer skipped the step itself: fused ones unscale gradients, and skip, inside."""
        assert self._allocator is not None
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is not None and bool(found_inf):
            self._allocator.is_regularized = False
            return
        self._allocator.after_step(getattr(optimizer, "grad_scale", None))
        self._has_stepped = True

    @override
    def on_train_batch_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", *_: Any) -> None:
        if self._has_stepped and self._allocator is not None:
            pl_module.log("train/adalora_rank", self._allocator.mean_rank)
        self._has_stepped = False

    @override
    def on_train_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        self._stop()
        is_trial = trainer.fast_dev_run  # type: ignore[attr-defined]  # set by a connector
        if self._allocator is not None and not self._allocator.is_finished and not is_trial:
            rank_zero_warn(
                f"the run ended after {self._allocator.step} steps, and AdaLoRA prunes up to step "
                f"{self._allocator.last} of total_step={self._allocator.total_step}: the layers have not reached their "
                "ranks. Go on with ckpt_path=, or give the number of steps that the run has as total_step"
            )

    @override
    def on_exception(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._hook is not None:
            self._hook.remove()
        self._hook = None


def _num_steps(trainer: "pl.Trainer", settings: AdaLoRA) -> int:
    """Return the number of optimizer steps of the whole run."""
    steps = trainer.estimated_stepping_batches
    if trainer.fast_dev_run:  # type: ignore[attr-defined]  # set by a connector
        return max(int(steps), settings.tinit + settings.tfinal + 1)  # a trial of a run that is longer
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
