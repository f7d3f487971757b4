"""Adapter-only save and load for Lightning's own strategies, which are adopted in place.

``adopt`` swaps a strategy's class for ``LoRA<Strategy>(AdapterOnly, <Strategy>)``: what it did before it still does,
but its checkpoints hold the adapters and whatever else trains, and loading checks a file in full before anything is
copied.
"""

import functools
import inspect
import io
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.data import _set_sampler_epoch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_lora.checkpoint import (
    SECTION,
    check_tensors,
    copy_tensors,
    describe,
    fitting_tensors,
    other_state,
    read_checkpoint,
    renaming,
    section_of,
    trained_tensors,
)
from lightning_lora.fingerprint import hashes_outside_roots
from lightning_lora.inject import injected_roots, named_adapter_parameters
from lightning_lora.peft_export import save_peft
from lightning_lora.peft_format import CONFIG_NAME, WEIGHTS_NAME
from lightning_lora.root import clean_name
from lightning_lora.sharded import is_sharded, on_rank_zero
from lightning_lora.strategies import random_state
from lightning_lora.strategies.atomic_io import make_atomic
from lightning_lora.strategies.lockstep import Lockstep
from lightning_lora.strategies.optimizers import (
    gathered_state,
    match_by_name,
    names_of,
    parameter_names,
    prepare_optimizers,
    spread_state,
)
from lightning_lora.strategies.reduction import (
    prepare_ddp,
    reduce_in_fixed_order,
    share_buffers_again,
    share_buffers_once,
)

S = TypeVar("S")
STATE_KEY = "state_dict"


class AdapterOnly(Strategy):
    """Mixin for a Trainer strategy whose checkpoints hold the adapters alone.

    Attributes:
        shards: whether the strategy spreads the model over ranks, so that looking at it takes all of them.
        lockstep: what keeps the ranks of a run together.
    """

    shards: bool = False
    peft_roots: frozenset[str | None] = frozenset()  # as given to LoRACallback(module=...)
    lockstep: Lockstep | None = None  # of a run
    _frozen_outside: dict[str, int] | None = None
    _checked_readable: bool = False
    _loaded: dict[str, Any] | None = None
    _loaded_from: Any = None
    _random_states: list[dict[str, Any]] | None = None
    _loaders_to_restore: list[list[torch.Tensor]] | None = None

    @override
    def setup(self, trainer: "pl.Trainer") -> None:
        self.lockstep = Lockstep(trainer)
        super().setup(trainer)

    @override
    def on_validation_start(self) -> None:
        share_buffers_once(self.model)
        super().on_validation_start()

    @override
    def on_validation_end(self) -> None:
        share_buffers_again(self.model)
        super().on_validation_end()

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
        return {name: on_rank_zero(value, is_zero=self.is_global_zero) for name, value in self._trained_state().items()}

    def _trained_state(self) -> dict[str, Any]:
        module = self._adapted_module()
        # toggle_optimizer freezes for a while what another optimizer has moved
        held = {id(p) for optimizer in self.optimizers for p, state in optimizer.state.items() if state}
        # a target network follows without requiring grad, and is lost if it is not seen
        now = hashes_outside_roots(module) if self._frozen_outside is not None else {}
        changed = {name for name, value in now.items() if value != (self._frozen_outside or {}).get(name)}
        held |= {id(parameter) for name, parameter in module.named_parameters() if clean_name(name) in changed}
        return {**trained_tensors(module, also=held), **other_state(module)}

    def watch_frozen(self) -> None:
        """Remember the frozen parameters outside the adapted models, to save those that change all the same."""
        self._frozen_outside = hashes_outside_roots(self._adapted_module())

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Write one file on rank 0. Called on all ranks; gathers a few kilobytes of random states."""
        module = self._adapted_module()
        section = describe(module, STATE_KEY) if self.is_global_zero or self.shards else {}
        if "optimizer_states" in checkpoint:
            section["optimizers"] = [parameter_names(optimizer, names_of(module)) for optimizer in self.optimizers]
            combined = module.trainer.fit_loop._combined_loader
            loaders = random_state.collect_loaders([] if combined is None else combined.flattened)
            section["random_states"] = self._gather({**random_state.collect(), "loaders": loaders})
        # averaging callbacks may have put a full state in its place, the user's hook may have added to it
        names = self._trained_state().keys()
        base = {clean_name(name) for name, _ in module.named_parameters()} - names
        state = {name: value for name, value in checkpoint[STATE_KEY].items() if clean_name(name) not in base}
        lost = [name for name in trained_tensors(module) if name not in state]
        if lost:
            raise ValueError(
                f"on_save_checkpoint took {len(lost)} trained tensors out of checkpoint['state_dict'], {lost[0]!r} "
                "among them, and the file could not be resumed: keep them under their names"
            )
        checkpoint[STATE_KEY] = state
        checkpoint[SECTION] = section
        if self.is_global_zero and not self._checked_readable:
            _check_readable(checkpoint)
            self._checked_readable = True
        super().save_checkpoint(checkpoint, filepath, storage_options)
        if self.peft_roots and "://" in str(filepath):
            raise ValueError(f"save_peft=True writes directories on local disks only; the checkpoint is at {filepath}")
        if self.peft_roots and (self.is_global_zero or self.shards) and not Path(filepath).name.startswith("."):
            roots = injected_roots(module)
            wanted = (
                roots if None in self.peft_roots else {path: roots[path] for path in roots if path in self.peft_roots}
            )
            for path, root in wanted.items():
                save_peft(root, peft_directory(filepath, path if len(roots) > 1 else ""))

    @override
    def remove_checkpoint(self, filepath: Any) -> None:
        super().remove_checkpoint(filepath)
        directory = peft_directory(filepath)
        if self.peft_roots and self.is_global_zero and directory.is_dir():
            for config in [*directory.rglob(CONFIG_NAME)]:
                config.unlink()
                config.with_name(WEIGHTS_NAME).unlink(missing_ok=True)
            for folder in sorted((directory, *directory.rglob("*")), reverse=True):
                if folder.is_dir() and not any(folder.iterdir()):  # files of the user's stay
                    folder.rmdir()

    @override
    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a file and check it against the model; copies nothing. Called on all ranks."""
        torch.cuda.empty_cache()
        module = self._adapted_module()
        load = functools.partial(self.checkpoint_io.load_checkpoint, weights_only=True)
        checkpoint = read_checkpoint(checkpoint_path, load)
        # names and shapes are checked after the user's on_load_checkpoint, which may put back what its twin changed
        tensors = fitting_tensors(checkpoint, module, checkpoint_path, check_names=False)
        fitting = module.trainer.state.fn == TrainerFn.FITTING
        if fitting and ("optimizer_states" not in checkpoint or "loops" not in checkpoint):
            raise ValueError(
                f"{checkpoint_path} holds adapters but no optimizer and loop state (save_weights_only, or written "
                "by Fabric or plain torch), so no run can go on from it exactly. To start a new run from its weights: "
                f"LoRACallback(init_from={str(checkpoint_path)!r})"
            )
        if fitting:
            _let_finished_loaders_start_anew(checkpoint["loops"]["fit_loop"])
        checkpoint.setdefault("pytorch-lightning_version", pl.__version__)
        checkpoint[STATE_KEY] = tensors
        self._loaded, self._loaded_from = checkpoint, checkpoint_path
        self._random_states = checkpoint[SECTION].get("random_states") if fitting else None
        if self._random_states is not None and len(self._random_states) != self._num_ranks():
            rank_zero_info(
                f"{checkpoint_path} was written by {len(self._random_states)} processes, this run has "
                f"{self._num_ranks()}: random states are not restored, so shuffling and dropout differ from an "
                "uninterrupted run"
            )
            self._random_states = None
        return checkpoint

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        module = self._adapted_module()
        check_tensors(checkpoint[STATE_KEY], module, self._loaded_from)
        copy_tensors(checkpoint[STATE_KEY], module)
        if module.trainer.state.fn == TrainerFn.FITTING:
            # base parameters are in the file because they trained: BaseFinetuning freezes them again at setup
            adapters = {id(parameter) for _, parameter in named_adapter_parameters(module)}
            inside = {id(p) for root in injected_roots(module).values() for p in root.parameters()} - adapters
            for name, parameter in module.named_parameters():
                if clean_name(name) in checkpoint[STATE_KEY] and id(parameter) in inside:
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
        states = [
            match_by_name(state, names, optimizer, names_of(module), rename, self._loaded_from)
            for state, names, optimizer in zip(checkpoint["optimizer_states"], saved, self.optimizers, strict=True)
        ]
        states = [spread_state(state, one) for state, one in zip(states, self.optimizers, strict=True)]
        super().load_optimizer_state_dict({**checkpoint, "optimizer_states": states})

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return an optimizer's state, whole on rank 0. Called on all ranks."""
        inner = getattr(optimizer, "_optimizer", optimizer)  # of Lightning's wrapper
        return gathered_state(super().optimizer_state(optimizer), inner, is_zero=self.is_global_zero)

    @override
    def setup_optimizers(self, trainer: "pl.Trainer") -> None:
        super().setup_optimizers(trainer)
        prepare_optimizers(self.optimizers, self._adapted_module())

    @override
    def model_to_device(self) -> None:
        check_has_values(self._adapted_module(), type(self).__name__)
        super().model_to_device()  # type: ignore[safe-super]  # of the strategy mixed in with

    @override
    def teardown(self) -> None:
        if self.lockstep is not None:
            self.lockstep.close()
        try:
            super().teardown()
        except NotImplementedError:  # a model without values cannot go back to CPU, and was refused with a reason
            if first_on_meta(self._adapted_module()) is None:
                raise

    @override
    def _setup_model(self, model: nn.Module) -> nn.Module:
        if not self.shards:
            check_whole(model, type(self).__name__)
        wrapped = super()._setup_model(model)
        reduce_in_fixed_order(wrapped, self)
        return wrapped

    @override
    def process_dataloader(self, dataloader: object) -> object:
        # the last moment before the training data's iterator is made, which draws from the generators
        if self._adapted_module().trainer.training and self._random_states is not None:
            self.restore_random_state()
            if self._loaders_to_restore is None:
                self._loaders_to_restore = list(self._own_random_state().get("loaders", []))
            if self._loaders_to_restore:
                random_state.restore_loader(dataloader, self._loaders_to_restore.pop(0))
            # Lightning tells samplers the epoch only after a resumed run has made its iterator
            epochs: Any = self._adapted_module().trainer.fit_loop.epoch_progress.current
            _set_sampler_epoch(dataloader, epochs.processed)
        return super().process_dataloader(dataloader)

    def restore_random_state(self) -> None:
        """Put this rank's random generators where the loaded checkpoint left them; without one do nothing."""
        if self._random_states is not None:
            random_state.restore(self._own_random_state())

    def _own_random_state(self) -> dict[str, Any]:
        assert self._random_states is not None
        return self._random_states[int(getattr(self, "global_rank", 0))]

    def has_random_state(self) -> bool:
        """Whether a loaded checkpoint's random states are still to be restored."""
        return self._random_states is not None

    def forget_random_state(self) -> None:
        """Restore random states no more: the resumed run is under way."""
        self._random_states = self._loaders_to_restore = self._loaded = None

    def _adapted_module(self) -> "pl.LightningModule":
        assert self.lightning_module is not None
        return self.lightning_module

    def _num_ranks(self) -> int:
        return int(getattr(self, "world_size", 1))

    def _gather(self, value: Any) -> list[Any]:
        if self._num_ranks() == 1:
            return [value]
        gathered: list[Any] = [None] * self._num_ranks()
        torch.distributed.all_gather_object(gathered, value)
        return gathered


def adopt(strategy: Strategy) -> AdapterOnly:
    """Make a Trainer's strategy write and read adapter-only checkpoints, in place. Adopting twice does nothing.

    Raises:
        ValueError: the strategy shards or replaces the model in a way that is not served; the message says what to use.
    """
    if isinstance(strategy, AdapterOnly):
        _check_reader(strategy.checkpoint_io)
        make_atomic(strategy.checkpoint_io)
        return strategy
    if not isinstance(strategy, (SingleDeviceStrategy, DDPStrategy)) or is_deepspeed(strategy):
        raise ValueError(unsupported(type(strategy).__name__))
    _check_reader(strategy.checkpoint_io)
    make_atomic(strategy.checkpoint_io)
    if isinstance(strategy, DDPStrategy):
        prepare_ddp(strategy)
    strategy.__class__ = adopted_class(AdapterOnly, type(strategy))
    assert isinstance(strategy, AdapterOnly)
    return strategy


@functools.cache
def adopted_class(mixin: type[Any], base: type[Any]) -> type[Any]:
    """Return the class ``LoRA<Base>(mixin, Base)``."""
    return type(f"LoRA{base.__name__}", (mixin, base), {"__module__": base.__module__, "__doc__": base.__doc__})


def is_deepspeed(strategy: object) -> bool:
    """Whether a strategy is DeepSpeed's, which Lightning derives from DDP's."""
    return any(cls.__name__ == "DeepSpeedStrategy" for cls in type(strategy).__mro__)


def _check_reader(checkpoint_io: Any) -> None:
    """Raise ``ValueError`` for a ``CheckpointIO`` of the user's that cannot be told to read without running code."""
    parameters = inspect.signature(checkpoint_io.load_checkpoint).parameters.values()
    if not any(p.name == "weights_only" or p.kind is p.VAR_KEYWORD for p in parameters):
        raise ValueError(
            f"{type(checkpoint_io).__name__}.load_checkpoint takes no weights_only argument, so that its files could "
            "not be read back safely: add `weights_only=None` to it and hand it to torch.load"
        )


def check_whole(model: nn.Module, strategy: str) -> None:
    """Raise ``ValueError`` for a model that another strategy left in shards."""
    if any(is_sharded(parameter) for parameter in model.parameters()):
        raise ValueError(
            f"the model is in shards, from a run with 'fsdp_lora', and {strategy} wants it whole: build it anew and "
            "give ckpt_path= or init_from=, or go on with 'fsdp_lora'"
        )


def check_has_values(model: nn.Module, strategy: str) -> None:
    """Raise ``ValueError`` for an adapted model on the meta device, under a strategy that does not fill it."""
    name = first_on_meta(model)
    if name is not None and injected_roots(model):
        raise ValueError(
            f"{name!r} is on the meta device, and {strategy} has nothing to fill it from: build the model with its "
            "weights, as from_pretrained does, or use 'fsdp_lora', which reads them by base_weights="
        )


def first_on_meta(model: nn.Module) -> str | None:
    """Return the name of a tensor without values, if there is one."""
    named = (*model.named_parameters(), *model.named_buffers())
    return next((clean_name(name) for name, tensor in named if tensor.device.type == "meta"), None)


def _check_readable(checkpoint: dict[str, Any]) -> None:
    """Find out at the first save, not at the resume, that a file holds objects which a safe load refuses."""
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    buffer.seek(0)
    try:
        torch.load(buffer, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            "the checkpoint would hold objects that a safe load refuses, from hyperparameters (keep them out with "
            "save_hyperparameters(ignore=[...])), a callback's state, or on_save_checkpoint; give plain values, or "
            f"allow their class with torch.serialization.add_safe_globals. {error}"
        ) from error


def _let_finished_loaders_start_anew(fit_loop: dict[str, Any]) -> None:
    """Drop the position of stateful dataloaders from a file of an epoch's end.

    Loaded, they would go on behind their last batch, or shuffle by a state that an uninterrupted run has left behind.
    """
    if fit_loop["epoch_loop.batch_progress"].get("is_last_batch"):
        fit_loop["state_dict"].pop("combined_loader", None)


def unsupported(name: str) -> str:
    """Return the error for a strategy that cannot keep adapter checkpoints exact."""
    return (
        f"{name} is not supported: its checkpoints would hold the base or lose the adapters. Use strategy='auto' or "
        "'ddp' (every rank holds the frozen base, and only the adapters' gradients are exchanged), or 'fsdp_lora' "
        "(each rank holds its share of the base)"
    )


def peft_directory(filepath: Any, path: str = "") -> Path:
    """Return where the PEFT directory beside a checkpoint file is: ``last.ckpt`` has ``last-peft``."""
    stem = os.fspath(filepath).removesuffix(".ckpt")
    directory = Path(f"{stem}-peft")
    return directory / path if path else directory
