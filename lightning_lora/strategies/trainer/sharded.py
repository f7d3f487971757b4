"""Trainer lifecycle of sharded strategies: placement, gradient reduction, checkpoints, teardown."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_lora.distributed.elementwise import check_steps_on_parts
from lightning_lora.distributed.gradients import GradientReducer, clip_by_norm, clip_by_value, watch_steps
from lightning_lora.distributed.overflow import keep_overflows, share_overflows
from lightning_lora.distributed.replication import broadcast_together, changing_buffers
from lightning_lora.distributed.sharding import sharded_trainables
from lightning_lora.model.spread import guard_state
from lightning_lora.strategies.shared.launched import Launched, check_adapted
from lightning_lora.strategies.trainer.adapter_only import AdapterOnly
from lightning_lora.strategies.trainer.lockstep import Lockstep
from lightning_lora.strategies.trainer.logged import log_adapters


class ShardedStrategy(Launched, AdapterOnly, ParallelStrategy):
    """Base of ``fsdp_lora`` and ``megatron_lora`` for the Trainer.

    A subclass says how the model is placed (:meth:`place`) and over which ranks which gradients are averaged
    (:meth:`make_reducers`).
    """

    shards = True
    strategy_name: str
    _lightning_base = ParallelStrategy

    # of a run
    _reducers: tuple[GradientReducer, ...] = ()
    _buffers: tuple[Tensor, ...] = ()

    def place(self, model: nn.Module) -> None:
        """Spread the model over the ranks in place, each part on its device. Called on all ranks."""
        raise NotImplementedError

    def make_reducers(self, model: nn.Module) -> list[GradientReducer]:
        """Return what averages the gradients of a placed model; the first takes in what is unfrozen later."""
        raise NotImplementedError

    def after_reduction(self, model: nn.Module) -> None:
        """Mend what the gradients of a placed model need besides."""

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
        check_adapted(self.model, self.strategy_name)
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
            self._reducers = tuple(self.make_reducers(self.model))
            share_overflows(getattr(self.precision_plugin, "scaler", None), self._before_unscaling)
            self._clip_reduced()
            self.setup_optimizers(trainer)
            for optimizer in self.optimizers:
                watch_steps(optimizer, self._before_step)
                guard_state(optimizer)
            if sharded_trainables(self.model):
                self._clip_over_ranks()
        self.setup_precision_plugin()

    def _release(self) -> None:
        for reducer in self._reducers:
            reducer.release()

    @override
    def setup_optimizers(self, trainer: "pl.Trainer") -> None:
        self.optimizers, self.lr_scheduler_configs = [], []  # of an earlier fit
        super().setup_optimizers(trainer)
        for optimizer in self.optimizers:
            check_steps_on_parts(optimizer)

    def _before_step(self, optimizer: Optimizer, *, reduces: bool) -> None:
        """Reduce what would be stepped on unreduced, also of tensors that came into an optimizer during the run."""
        self._take_in_unfrozen()
        assert self.lightning_module is not None
        # Lightning hands every step a closure; under manual optimization one that does nothing
        if reduces or not self.lightning_module.automatic_optimization:
            self._reduce_pending()

    def _before_unscaling(self) -> None:
        self._take_in_unfrozen()
        self._reduce_pending()

    def _reduce_pending(self) -> None:
        for reducer in self._reducers:
            reducer.before_step()

    def _take_in_unfrozen(self) -> None:
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        for reducer in self._reducers:
            reducer.add(p for group in groups for p in group["params"])

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
        for reducer in self._reducers:
            reducer.before_backward()
        self.pre_backward(closure_loss)
        assert self.lightning_module is not None
        closure_loss = self.precision_plugin.pre_backward(closure_loss, self.lightning_module)
        self.precision_plugin.backward(closure_loss, self.lightning_module, optimizer, *args, **kwargs)
        self._take_in_unfrozen()
        for reducer in self._reducers:
            reducer.after_backward()
        if not self._reducers[0].is_blocked:
            self.after_reduction(self.lightning_module)
        closure_loss = self.precision_plugin.post_backward(closure_loss, self.lightning_module)
        self.post_backward(closure_loss)
        return closure_loss

    @contextmanager
    @override
    def block_backward_sync(self) -> Iterator[None]:
        """Let gradients accumulate on each rank, without communication."""
        with ExitStack() as stack:
            for reducer in self._reducers:
                stack.enter_context(reducer.no_sync())
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
        for reducer in self._reducers:
            reducer.check_equal()
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
        keep_overflows(getattr(self.precision_plugin, "scaler", None))
        self.precision_plugin.teardown()
        self.accelerator.teardown()
        self.checkpoint_io.teardown()
