"""Adapter-only save and load for every strategy of the Trainer.

Checkpoints hold the adapters and whatever else trains, and loading checks a file in full before anything is copied.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.trainer.states import TrainerFn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_lora.checkpoint.changed import UNCHANGED, Changed, changed_adapters
from lightning_lora.checkpoint.file import SECTION, adapters_in, other_state, trained_tensors
from lightning_lora.checkpoint.fitting import check_tensors, complete_state, copy_tensors, fitting_tensors
from lightning_lora.checkpoint.frozen import count_as_moved, look_for_moved, moved_tensors
from lightning_lora.checkpoint.optimizer_matching import (
    match_by_name,
    names_of,
    paired_groups,
    parameter_names,
)
from lightning_lora.checkpoint.optimizer_state import prepare_optimizers, spread_state
from lightning_lora.checkpoint.reading import renaming, section_of
from lightning_lora.compat.torch import move_groups
from lightning_lora.distributed.gradient_norm import clip_apart
from lightning_lora.distributed.overflow import check_scalable
from lightning_lora.model.names import clean_name
from lightning_lora.model.own_parameters import owners
from lightning_lora.model.state import OnNonfinite, injected_roots, named_adapter_parameters
from lightning_lora.strategies.shared.adapter_only import AdapterCheckpoints
from lightning_lora.strategies.shared.refusals import (
    check_readable,
)
from lightning_lora.strategies.trainer.lockstep import Lockstep
from lightning_lora.strategies.trainer.peft_beside import PeftBeside
from lightning_lora.strategies.trainer.run_position import RunPosition, begin_after_finished_epoch, correct_progress

STATE_KEY = "state_dict"


class AdapterOnly(AdapterCheckpoints, Strategy):
    """Mixin for a Trainer strategy whose checkpoints hold the adapters alone.

    Attributes:
        lockstep: what keeps the ranks of a run together.
    """

    on_nonfinite: OnNonfinite | None = None
    lockstep: Lockstep | None = None  # of a run
    _loaded_from: Any = None
    _changed: Changed = UNCHANGED

    @functools.cached_property
    def position(self) -> RunPosition:
        """Where the run stands."""
        return RunPosition(self)

    @functools.cached_property
    def peft_beside(self) -> PeftBeside:
        """The PEFT directories beside the run's checkpoints."""
        return PeftBeside()

    @override
    def on_exception(self, exception: BaseException) -> None:
        if self.lockstep is not None:
            self.lockstep.fail(exception)
        super().on_exception(exception)

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return what trains or changed, under the names that it has in the LightningModule. Called on all ranks.

        What is spread over ranks is gathered to rank 0.
        """
        self.position.note()
        look_for_moved(self._adapted_module())
        return self._whole(self._trained_state())

    def _trained_state(self) -> dict[str, Any]:
        module = self._adapted_module()
        # toggle_optimizer freezes for a while what another optimizer has moved
        held = {id(p) for optimizer in self.optimizers for p, state in optimizer.state.items() if state}
        return {**trained_tensors(module, also=held | moved_tensors(module)), **other_state(module)}

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Write one file on rank 0. Called on all ranks; gathers a few kilobytes of random states."""
        section = self._describe_run(checkpoint)
        self._remove_base(checkpoint)
        adapters = adapters_in(checkpoint[STATE_KEY], self._adapted_module())
        self._check_finite(adapters, filepath, self.on_nonfinite_at_save())
        checkpoint[SECTION] = section
        if self.is_global_zero:
            check_readable(
                checkpoint,
                "the checkpoint would hold objects that a safe load refuses, from hyperparameters (keep them out with "
                "save_hyperparameters(ignore=[...])), a callback's state, or on_save_checkpoint; give plain values",
            )
        super().save_checkpoint(checkpoint, filepath, storage_options)
        self.peft_beside.write(self, checkpoint, filepath, STATE_KEY)

    def _describe_run(self, checkpoint: dict[str, Any]) -> dict[str, Any]:
        """Return the section about the adapters, their base, the optimizers and the position. Called on all ranks."""
        module = self._adapted_module()
        section = self._describe({STATE_KEY: module})
        if "optimizer_states" in checkpoint:
            section["optimizers"] = [parameter_names(optimizer, names_of(module)) for optimizer in self.optimizers]
            self.position.add_to(checkpoint, section, self._num_ranks())
        return section

    def _remove_base(self, checkpoint: dict[str, Any]) -> None:
        """Take base weights out of a checkpoint, where averaging callbacks or the user's hook have put them.

        Raises:
            ValueError: trained tensors are missing.
        """
        module = self._adapted_module()
        base = {clean_name(name) for name in module.state_dict()} - self._trained_state().keys()
        for holder, key in _model_states(checkpoint):
            named = {clean_name(name): value for name, value in holder[key].items()}
            holder[key] = {name: value for name, value in named.items() if name not in base}
        lost = [name for name in trained_tensors(module) if name not in checkpoint[STATE_KEY]]
        if lost:
            raise ValueError(
                f"on_save_checkpoint took {len(lost)} trained tensors out of checkpoint['state_dict'], {lost[0]!r} "
                "among them, and the file could not be resumed: keep them under their names"
            )

    def on_nonfinite_at_save(self) -> OnNonfinite:
        """Return what a save does about NaN: it must neither end a run unasked, nor hide the error that ends one."""
        return "warn" if self._adapted_module().trainer.interrupted else self.on_nonfinite or "warn"

    @override
    def remove_checkpoint(self, filepath: Any) -> None:
        super().remove_checkpoint(filepath)
        if self.is_global_zero:
            self.peft_beside.remove(filepath)

    @override
    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a file and check it against the model; copies nothing. Called on all ranks."""
        module = self._adapted_module()
        checkpoint = self._read(checkpoint_path)
        # names and shapes are checked after the user's on_load_checkpoint, which may put back what its twin changed
        tensors = fitting_tensors(
            checkpoint, module, checkpoint_path, check_names=False, on_nonfinite=self.on_nonfinite or "error"
        )
        fitting = module.trainer.state.fn == TrainerFn.FITTING
        if fitting and ("optimizer_states" not in checkpoint or "loops" not in checkpoint):
            raise ValueError(
                f"{checkpoint_path} holds adapters but no optimizer and loop state (save_weights_only, or written "
                "by Fabric or plain torch), so no run can go on from it exactly. To start a new run from its weights: "
                f"LoRACallback(init_from={str(checkpoint_path)!r})"
            )
        if fitting:
            self._check_left_out(checkpoint, {STATE_KEY: module}, checkpoint_path)
            correct_progress(checkpoint["loops"]["fit_loop"], module.trainer.accumulate_grad_batches)
        checkpoint.setdefault("pytorch-lightning_version", pl.__version__)
        checkpoint[STATE_KEY] = tensors
        self._loaded_from = checkpoint_path
        self._changed = changed_adapters(checkpoint, module, checkpoint_path)
        states = checkpoint[SECTION].get("random_states") if fitting else None
        self.position.load(states, self._num_ranks(), checkpoint_path)
        return checkpoint

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        module = self._adapted_module()
        check_tensors(checkpoint[STATE_KEY], module, self._loaded_from, self._changed)
        copy_tensors(checkpoint[STATE_KEY], module)
        count_as_moved(module, checkpoint[STATE_KEY])
        trained = checkpoint[STATE_KEY].keys()
        for holder, key in _model_states(checkpoint):  # averaging callbacks load them next, strictly
            holder[key] = complete_state(holder[key], module)
        if module.trainer.state.fn == TrainerFn.FITTING:
            # base parameters are in the file because they moved, or trained: BaseFinetuning freezes them again at setup
            rename = renaming(checkpoint, module, self._loaded_from, STATE_KEY)
            recorded = section_of(checkpoint, self._loaded_from).get("left_out", {}).get(STATE_KEY, {})
            moved = {rename(name) for name in recorded.get("moved", ())}
            adapters = {id(parameter) for _, parameter in named_adapter_parameters(module)}
            inside = {id(p) for root in injected_roots(module).values() for p in root.parameters()} - adapters
            for name, parameter in module.named_parameters():
                if clean_name(name) in trained - moved and id(parameter) in inside:
                    parameter.requires_grad_(True)

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        module = self._adapted_module()
        saved = section_of(checkpoint, self._loaded_from)["optimizers"]
        if len(saved) != len(self.optimizers):
            raise ValueError(
                f"{self._loaded_from} holds the state of {len(saved)} optimizers, configure_optimizers returned "
                f"{len(self.optimizers)}"
            )
        adapters = section_of(checkpoint, self._loaded_from)["adapters"]
        rename = renaming(checkpoint, module, self._loaded_from, adapters[0]["state_key"])
        files = self._loaded_from, self._changed
        states = [
            spread_state(match_by_name(state, names, one, names_of(module), rename, *files), one)
            for state, names, one in zip(checkpoint["optimizer_states"], saved, self.optimizers, strict=True)
        ]
        if self._changed != UNCHANGED:
            self._move_schedules(checkpoint, rename)
        super().load_optimizer_state_dict({**checkpoint, "optimizer_states": states})
        begin_after_finished_epoch(module.trainer)  # the loops are restored just before the optimizers

    def _move_schedules(self, checkpoint: Mapping[str, Any], rename: Callable[[str], str]) -> None:
        """Let a checkpoint's schedulers, which are loaded next, follow the groups that adapters left or came into."""
        names, saved = names_of(self._adapted_module()), section_of(checkpoint, self._loaded_from)["optimizers"]
        for config, state in zip(self.lr_scheduler_configs, checkpoint["lr_schedulers"], strict=True):
            optimizer: Any = config.scheduler.optimizer
            index = next(i for i, one in enumerate(self.optimizers) if one is optimizer)
            theirs = [[rename(name) for name in group] for group in saved[index]]
            groups = checkpoint["optimizer_states"][index]["param_groups"]
            ours = parameter_names(optimizer, names), optimizer.param_groups
            places = paired_groups(theirs, groups, *ours, self._loaded_from, self._changed)
            move_groups(state, places, config.scheduler.state_dict())

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return an optimizer's state, whole on rank 0. Called on all ranks."""
        return self._whole_state(super().optimizer_state(optimizer), optimizer)

    @override
    def setup_optimizers(self, trainer: "pl.Trainer") -> None:
        super().setup_optimizers(trainer)
        check_scalable(self.scaler, self.optimizers)
        prepare_optimizers(self.optimizers, self._adapted_module())
        vars(self.precision_plugin).pop("clip_grad_by_norm", None)  # of an earlier fit
        if owners(self._adapted_module()):
            self.precision_plugin.clip_grad_by_norm = self.clip_apart  # type: ignore[method-assign,assignment]

    def clip_apart(self, optimizer: Optimizer, max_norm: float | Mapping[str, float]) -> None:
        """Clip the gradients of each named adapter by their own norm; with a mapping those of its adapters alone."""
        clip_apart(self.precision_plugin.main_params(optimizer), owners(self._adapted_module()), max_norm)

    @override
    def process_dataloader(self, dataloader: object) -> object:
        # the last moment before the training data's iterator is made, which draws from the generators
        trainer: Any = self._adapted_module().trainer
        if trainer.training:
            self.position.before_iterator(dataloader, trainer.fit_loop.epoch_progress.current.processed)
        return super().process_dataloader(dataloader)

    def _adapted_module(self) -> "pl.LightningModule":
        assert self.lightning_module is not None
        return self.lightning_module


def _model_states(checkpoint: Any) -> list[tuple[dict[str, Any], str]]:
    """Return where a checkpoint has states of the whole model: its own, and those of Lightning's averaging callbacks.

    Returns:
        Pairs of a dictionary and the key of a state in it.
    """
    callbacks = [state for state in checkpoint.get("callbacks", {}).values() if isinstance(state, dict)]
    places = [(checkpoint, STATE_KEY), (checkpoint, "current_model_state")]
    places += [(state, "average_model_state") for state in callbacks]
    return [(holder, key) for holder, key in places if isinstance(holder.get(key), Mapping)]
