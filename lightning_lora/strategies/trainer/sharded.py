"""Trainer lifecycle of sharded strategies: what Lightning calls for placement, reduction, checkpoints, teardown."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_lora.distributed.elementwise import check_steps_on_parts
from lightning_lora.distributed.gradient_norm import clip_by_norm, clip_by_value
from lightning_lora.distributed.gradients import watch_steps
from lightning_lora.distributed.overflow import keep_overflows, share_overflows
from lightning_lora.distributed.replication import broadcast_together, changing_buffers
from lightning_lora.distributed.sharded_gradients import sharded_trainables
from lightning_lora.model.spread import guard_state
from lightning_lora.strategies.shared.sharded import Sharded
from lightning_lora.strategies.trainer.adapter_only import AdapterOnly
from lightning_lora.strategies.trainer.lockstep import Lockstep
from lightning_lora.strategies.trainer.logged import log_adapters


class ShardedStrategy(Sharded, AdapterOnly, ParallelStrategy):
    """Base of ``fsdp_lora`` and ``megatron_lora`` for the Trainer."""

    _lightning_base = ParallelStrategy
    _buffers: tuple[Tensor, ...] = ()  # of a run

    @property
    def is_distributed(self) -> bool:
        """Whether Lightning gives each rank its own part of the data."""
        return True

    @property
    @override
    def restore_checkpoint_after_setup(self) -> bool:
        return True  # the tensors that a file is copied into are made there

    @override
    def setup(self, trainer: "pl.Trainer") -> None:
        assert self.model is not None
        assert self.accelerator is not None
        self.accelerator.setup(trainer)
        self.check_adapted(self.model)
        self.lockstep = Lockstep(trainer)
        log_adapters(trainer)
        evaluating = (trainer.fit_loop.epoch_loop.val_loop, trainer.validate_loop, trainer.test_loop)
        for loop in (*evaluating, trainer.predict_loop):
            loop.inference_mode = False  # FSDP2's first forward in it leaves tensors that cannot train
        self.model = self.precision_plugin.convert_module(self.model)
        self.place(self.model)
        self._buffers = tuple(changing_buffers(self.model))
        self.barrier()
        if trainer.state.fn == TrainerFn.FITTING:
            self._release()
            self._watch(self.model)
            share_overflows(self.scaler, self._before_unscaling)
            self._clip_reduced()
            self.setup_optimizers(trainer)
            for optimizer in self.optimizers:
                watch_steps(optimizer, self._before_step)
                guard_state(optimizer)
            if sharded_trainables(self.model):
                self._clip_over_ranks()
        self.setup_precision_plugin()

    @override
    def setup_optimizers(self, trainer: "pl.Trainer") -> None:
        self.optimizers, self.lr_scheduler_configs = [], []  # of an earlier fit
        super().setup_optimizers(trainer)
        for optimizer in self.optimizers:
            check_steps_on_parts(optimizer)

    def _before_step(self, optimizer: Optimizer, *, reduces: bool) -> None:
        """Reduce what would be stepped on unreduced, also of tensors that came into an optimizer during the run."""
        self._take_in_unfrozen()
        # Lightning hands every step a closure; under manual optimization one that does nothing
        super()._before_step(optimizer, reduces=reduces or not self._adapted_module().automatic_optimization)

    @override
    def may_train(self, model: nn.Module) -> Iterable[nn.Parameter]:
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        return (parameter for group in groups for parameter in group["params"])

    def _take_in_unfrozen(self) -> None:
        for model, reducers in self._reducers.items():
            for reducer in reducers:
                reducer.add(self.may_train(model))

    def _before_unscaling(self) -> None:
        self._take_in_unfrozen()
        self._reduce_pending()

    def _clip_reduced(self) -> None:
        plugin: Any = self.precision_plugin
        clip = plugin.clip_gradients

        def clip_gradients(*args: Any, **kwargs: Any) -> None:
            self._reduce_pending()
            clip(*args, **kwargs)

        plugin.clip_gradients = clip_gradients

    def _clip_over_ranks(self) -> None:
        # the plugin's own would mix tensors that are spread with tensors that are whole, which torch refuses
        plugin: Any = self.precision_plugin
        if "clip_grad_by_norm" not in vars(plugin):  # of named adapters
            plugin.clip_grad_by_norm = lambda optimizer, value: clip_by_norm(plugin.main_params(optimizer), value)
        plugin.clip_grad_by_value = lambda optimizer, value: clip_by_value(plugin.main_params(optimizer), value)

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        self._share_buffers()
        return super().training_step(*args, **kwargs)

    @override
    def on_validation_start(self) -> None:
        self._share_buffers()  # once: ranks may have unequal numbers of batches
        super().on_validation_start()

    def _share_buffers(self) -> None:
        """Give every rank rank 0's running statistics of the user's own layers, as DDP does."""
        if self._buffers:
            broadcast_together(self._buffers, self.root_device)

    @override
    def model_to_device(self) -> None:
        """Do nothing: sharding brings each part to its device."""

    @override
    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        """Run backward and reduce the adapters' gradients before any hook can read them."""
        self._before_backward()
        self.pre_backward(closure_loss)
        module = self._adapted_module()
        closure_loss = self.precision_plugin.pre_backward(closure_loss, module)
        self.precision_plugin.backward(closure_loss, module, optimizer, *args, **kwargs)
        self._after_backward()
        closure_loss = self.precision_plugin.post_backward(closure_loss, module)
        self.post_backward(closure_loss)
        return closure_loss

    @contextmanager
    @override
    def block_backward_sync(self) -> Iterator[None]:
        """Let gradients accumulate on each rank, without communication."""
        assert self.model is not None
        with self.accumulating(self.model):
            yield

    @contextmanager
    @override
    def tensor_init_context(self, empty_init: bool | None = None) -> Iterator[None]:
        with torch.device("meta") if empty_init else nullcontext(), self.precision_plugin.tensor_init_context():
            yield

    @override
    def reduce(self, tensor: Any, group: Any | None = None, reduce_op: Any = "mean") -> Any:
        return self.reduced(tensor, group, reduce_op)

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        self._check_equal()
        # the batch-size scaler draws another path on every rank
        super().save_checkpoint(checkpoint, self.broadcast(filepath), storage_options)

    @override
    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return super().load_checkpoint(self.broadcast(checkpoint_path), weights_only)

    @override
    def teardown(self) -> None:
        # the model stays where it is: its shards belong to this device
        if self.lockstep is not None:
            self.lockstep.close()
        assert self.cluster_environment is not None
        assert self.accelerator is not None
        self.cluster_environment.teardown()
        self._release()
        for name in ("clip_gradients", "clip_grad_by_norm", "clip_grad_by_value"):
            self.precision_plugin.__dict__.pop(name, None)
        keep_overflows(self.scaler)
        self.precision_plugin.teardown()
        self.accelerator.teardown()
        self.checkpoint_io.teardown()
