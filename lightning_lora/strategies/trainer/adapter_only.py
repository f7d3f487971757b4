"""Adapter-only save and load for Lightning's own strategies, which are adopted in place.

``adopt`` swaps a strategy's class for ``LoRA<Strategy>(AdapterOnly, <Strategy>)``: what it did before it still does,
but its checkpoints hold the adapters and whatever else trains, and loading checks a file in full before anything is
copied.
"""

import contextlib
import functools
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_lora.checkpoint.file import SECTION, adapters_in, describe, other_state, trained_tensors
from lightning_lora.checkpoint.fitting import check_tensors, complete_state, copy_tensors, fitting_tensors
from lightning_lora.checkpoint.frozen import (
    count_as_moved,
    describe_left_out,
    look_for_moved,
    moved_tensors,
    other_left_out,
    refusal_of_left_out,
)
from lightning_lora.checkpoint.optimizer_state import (
    gathered_state,
    match_by_name,
    names_of,
    parameter_names,
    prepare_optimizers,
    spread_state,
)
from lightning_lora.checkpoint.reading import read_checkpoint, renaming, section_of
from lightning_lora.distributed.ddp import (
    Reduction,
    reduce_in_fixed_order,
    share_buffers_again,
    share_buffers_once,
)
from lightning_lora.distributed.overflow import check_scalable
from lightning_lora.model.names import clean_name
from lightning_lora.model.state import OnNonfinite, check_finite, injected_roots, named_adapter_parameters
from lightning_lora.ops.sharded import on_rank_zero
from lightning_lora.strategies.shared.adoption import adopt_class
from lightning_lora.strategies.shared.refusals import (
    check_has_values,
    check_readable,
    check_reader,
    check_served,
    check_whole,
    first_on_meta,
)
from lightning_lora.strategies.trainer.lockstep import Lockstep
from lightning_lora.strategies.trainer.logged import log_adapters
from lightning_lora.strategies.trainer.peft_beside import PeftBeside
from lightning_lora.strategies.trainer.progress import begin_after_finished_epoch, correct_progress
from lightning_lora.strategies.trainer.run_position import RunPosition

STATE_KEY = "state_dict"


class AdapterOnly(Strategy):
    """Mixin for a Trainer strategy whose checkpoints hold the adapters alone.

    Attributes:
        shards: whether the strategy spreads the model over ranks, so that reading it takes all of them.
        lockstep: what keeps the ranks of a run together.
    """

    shards: bool = False
    on_nonfinite: OnNonfinite | None = None
    lockstep: Lockstep | None = None  # of a run
    _reduction: Reduction | None = None  # under DDP
    _loaded_from: Any = None

    @functools.cached_property
    def position(self) -> RunPosition:
        """Where the run stands."""
        return RunPosition(self)

    @functools.cached_property
    def peft_beside(self) -> PeftBeside:
        """The PEFT directories beside the run's checkpoints."""
        return PeftBeside()

    @override
    def setup(self, trainer: "pl.Trainer") -> None:
        self.lockstep = Lockstep(trainer)
        log_adapters(trainer)
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
        self.position.note()
        look_for_moved(self._adapted_module())
        return {name: on_rank_zero(value, is_zero=self.is_global_zero) for name, value in self._trained_state().items()}

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
        self._check_finite(checkpoint[STATE_KEY], filepath)
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
        module, section = self._adapted_module(), {}
        if self.is_global_zero or self.shards:
            section = describe(module, STATE_KEY, moved_tensors(module))
            section["left_out"] = {STATE_KEY: describe_left_out(module)}
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

    def _check_finite(self, state: Mapping[str, Any], filepath: Any) -> None:
        """Warn of adapters that hold NaN or infinity, or raise ``ValueError`` on all ranks. Called on all ranks."""
        adapters, on_nonfinite = adapters_in(state, self._adapted_module()), self.on_nonfinite_at_save()
        failure = None
        try:
            check_finite(adapters, filepath, on_nonfinite)
        except ValueError as error:
            failure = str(error)
        if on_nonfinite == "error":
            failure = self.broadcast(failure)  # rank 0 alone holds whole tensors
        if failure is not None:
            raise ValueError(failure)

    @override
    def remove_checkpoint(self, filepath: Any) -> None:
        super().remove_checkpoint(filepath)
        if self.is_global_zero:
            self.peft_beside.remove(filepath)

    @override
    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a file and check it against the model; copies nothing. Called on all ranks."""
        torch.cuda.empty_cache()
        module = self._adapted_module()
        load = functools.partial(self.checkpoint_io.load_checkpoint, weights_only=True)
        checkpoint = read_checkpoint(checkpoint_path, load)
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
            self._check_left_out(checkpoint, checkpoint_path)
            correct_progress(checkpoint["loops"]["fit_loop"], module.trainer.accumulate_grad_batches)
        checkpoint.setdefault("pytorch-lightning_version", pl.__version__)
        checkpoint[STATE_KEY] = tensors
        self._loaded_from = checkpoint_path
        states = checkpoint[SECTION].get("random_states") if fitting else None
        self.position.load(states, self._num_ranks(), checkpoint_path)
        return checkpoint

    def _check_left_out(self, checkpoint: dict[str, Any], source: Any) -> None:
        """Raise ``ValueError`` on all ranks where rank 0 built what the file leaves out with other values."""
        recorded = section_of(checkpoint, source).get("left_out", {}).get(STATE_KEY)
        if recorded is None:  # of a version that did not say
            return
        name = None
        if self.is_global_zero or self.shards:
            module = self._adapted_module()
            name = other_left_out(recorded, module, renaming(checkpoint, module, source, STATE_KEY))
        name = self.broadcast(name)
        if name is not None:
            raise ValueError(refusal_of_left_out(name, source))

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        module = self._adapted_module()
        check_tensors(checkpoint[STATE_KEY], module, self._loaded_from)
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
        states = [
            match_by_name(state, names, optimizer, names_of(module), rename, self._loaded_from)
            for state, names, optimizer in zip(checkpoint["optimizer_states"], saved, self.optimizers, strict=True)
        ]
        states = [spread_state(state, one) for state, one in zip(states, self.optimizers, strict=True)]
        super().load_optimizer_state_dict({**checkpoint, "optimizer_states": states})
        begin_after_finished_epoch(module.trainer)  # the loops are restored just before the optimizers

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return an optimizer's state, whole on rank 0. Called on all ranks."""
        inner = getattr(optimizer, "optimizer", optimizer)  # of Lightning's wrapper
        return gathered_state(super().optimizer_state(optimizer), inner, is_zero=self.is_global_zero)

    @override
    def setup_optimizers(self, trainer: "pl.Trainer") -> None:
        super().setup_optimizers(trainer)
        check_scalable(getattr(self.precision_plugin, "scaler", None), self.optimizers)
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
        self._reduction = reduce_in_fixed_order(wrapped, self)
        return wrapped

    @override
    def backward(self, closure_loss: torch.Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Any:
        """Run backward; under DDP, what this rank did not use counts as zero before any hook can read gradients."""
        self.pre_backward(closure_loss)
        if self._reduction is not None:
            self._reduction.begin()
        module = self._adapted_module()
        closure_loss = self.precision_plugin.pre_backward(closure_loss, module)
        with contextlib.nullcontext() if self._reduction is None else self._reduction.filled():
            self.precision_plugin.backward(closure_loss, module, optimizer, *args, **kwargs)
        closure_loss = self.precision_plugin.post_backward(closure_loss, module)
        self.post_backward(closure_loss)
        return closure_loss

    @override
    def process_dataloader(self, dataloader: object) -> object:
        # the last moment before the training data's iterator is made, which draws from the generators
        trainer: Any = self._adapted_module().trainer
        if trainer.training:
            self.position.before_iterator(dataloader, trainer.fit_loop.epoch_progress.current.processed)
        return super().process_dataloader(dataloader)

    def random_state_of_this_rank(self, states: list[dict[str, Any]]) -> dict[str, Any]:
        """Return this rank's random states among those of all ranks."""
        return states[int(getattr(self, "global_rank", 0))]

    def _adapted_module(self) -> "pl.LightningModule":
        assert self.lightning_module is not None
        return self.lightning_module

    def _num_ranks(self) -> int:
        return int(getattr(self, "world_size", 1))


def _model_states(checkpoint: Any) -> list[tuple[dict[str, Any], str]]:
    """Return where a checkpoint has states of the whole model: its own, and those of Lightning's averaging callbacks.

    Returns:
        Pairs of a dictionary and the key of a state in it.
    """
    callbacks = [state for state in checkpoint.get("callbacks", {}).values() if isinstance(state, dict)]
    places = [(checkpoint, STATE_KEY), (checkpoint, "current_model_state")]
    places += [(state, "average_model_state") for state in callbacks]
    return [(holder, key) for holder, key in places if isinstance(holder.get(key), Mapping)]


def adopt(strategy: Strategy) -> AdapterOnly:
    """Make a Trainer's strategy write and read adapter-only checkpoints, in place; see :func:`swap_class`.

    Raises:
        ValueError: the strategy, or how it reads files, is not served.
    """
    check_served(strategy, (AdapterOnly, SingleDeviceStrategy, DDPStrategy))
    check_reader(strategy.checkpoint_io)
    adopt_class(strategy, AdapterOnly, DDPStrategy)
    assert isinstance(strategy, AdapterOnly)
    return strategy
