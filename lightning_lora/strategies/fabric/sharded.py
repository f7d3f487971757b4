"""Fabric lifecycle of sharded strategies: what Fabric calls for placement, reduction, checkpoints, teardown."""

from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from lightning.fabric.strategies import ParallelStrategy
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.weak import WeakTensorKeyDictionary
from typing_extensions import override

from lightning_lora.checkpoint.frozen import look_for_moved
from lightning_lora.checkpoint.optimizer_state import follow_parameters
from lightning_lora.compat.lightning import set_backward_sync
from lightning_lora.distributed.elementwise import check_steps_on_parts
from lightning_lora.distributed.gradient_norm import clip_apart, clip_by_norm, clip_by_value
from lightning_lora.distributed.gradients import watch_steps
from lightning_lora.distributed.overflow import keep_overflows, share_overflows
from lightning_lora.distributed.replication import broadcast_together, changing_buffers
from lightning_lora.model.own_parameters import owners
from lightning_lora.model.spread import guard_state
from lightning_lora.strategies.fabric.adapter_only import FabricAdapterOnly
from lightning_lora.strategies.shared.sharded import Sharded


class FabricShardedStrategy(Sharded, FabricAdapterOnly, ParallelStrategy):
    """Base of ``fsdp_lora`` and ``megatron_lora`` for Fabric."""

    _lightning_base = ParallelStrategy

    @override
    def setup_environment(self) -> None:
        super().setup_environment()
        self._replaced = WeakTensorKeyDictionary()  # what trained before placing put another in its place
        set_backward_sync(self, _NoSync(self))

    @override
    def setup_module(self, module: nn.Module) -> nn.Module:
        self.check_adapted(module)
        share_overflows(self.scaler, self._reduce_pending)
        before = dict(module.named_parameters())
        self.place(module)
        self._watch(module)
        after = dict(module.named_parameters())
        self._replaced.update({p: None for name, p in before.items() if p.requires_grad and after[name] is not p})
        buffers = changing_buffers(module)
        if buffers:  # rank 0's running statistics for every rank, as under DDP
            module.register_forward_pre_hook(lambda *_: broadcast_together(buffers, self.root_device))
        look_for_moved(module)
        return module

    @override
    def setup_module_and_optimizers(
        self, module: nn.Module, optimizers: list[Optimizer], scheduler: Any = None
    ) -> tuple[nn.Module, list[Optimizer], Any]:
        """Place a module; its optimizers follow it to the parameters that it has then, and drop the frozen ones."""
        before = dict(module.named_parameters())
        module = self.setup_module(module)
        for optimizer in optimizers:
            follow_parameters(optimizer, before, dict(module.named_parameters()))
        return module, [self.setup_optimizer(optimizer) for optimizer in optimizers], scheduler

    @override
    def setup_optimizer(self, optimizer: Optimizer) -> Optimizer:
        if any(p in self._replaced for group in optimizer.param_groups for p in group["params"]):
            raise ValueError(
                "the optimizer holds parameters as they were before the model was sharded, and would train nothing: "
                "call fabric.setup(model, optimizer) with both, or make the optimizer after fabric.setup(model)"
            )
        check_steps_on_parts(optimizer)
        watch_steps(optimizer, self._before_step)
        guard_state(optimizer)
        return super().setup_optimizer(optimizer)

    @override
    def module_to_device(self, module: nn.Module) -> None:
        """Do nothing: placing brings each part to its device."""

    @override
    def module_init_context(self, empty_init: bool | None = None) -> AbstractContextManager[Any]:
        stack = ExitStack()
        if empty_init:
            stack.enter_context(torch.device("meta"))
        stack.enter_context(self.precision.module_init_context())
        return stack

    @override
    def backward(self, tensor: Tensor, module: nn.Module | None, *args: Any, **kwargs: Any) -> None:
        """Run backward and reduce the adapters' gradients before anyone can read them."""
        self._before_backward()
        super().backward(tensor, module, *args, **kwargs)
        self._after_backward()

    @override
    def clip_gradients_norm(
        self,
        module: nn.Module,
        optimizer: Optimizer,
        max_norm: float | int,
        norm_type: float | int = 2.0,
        error_if_nonfinite: bool = True,
    ) -> Tensor:
        self._reduce_pending()
        self.precision.unscale_gradients(optimizer)
        parameters, named = self.precision.main_params(optimizer), owners(module)
        if named:
            return clip_apart(parameters, named, max_norm, norm_type, error_if_nonfinite)
        return clip_by_norm(parameters, max_norm, norm_type, error_if_nonfinite)

    @override
    def clip_gradients_value(self, module: nn.Module, optimizer: Optimizer, clip_val: float | int) -> None:
        self._reduce_pending()
        self.precision.unscale_gradients(optimizer)
        clip_by_value(self.precision.main_params(optimizer), clip_val)

    @override
    def save_checkpoint(self, path: Any, state: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        self._check_equal()
        super().save_checkpoint(path, state, *args, **kwargs)

    @override
    def all_reduce(self, tensor: Any, group: Any | None = None, reduce_op: Any = "mean") -> Any:
        return self.reduced(tensor, group, reduce_op)

    @override
    def teardown(self) -> None:
        keep_overflows(self.scaler)
        super().teardown()


class _NoSync:
    """Accumulate gradients on each rank, without communication. Fabric calls its one method."""

    def __init__(self, strategy: FabricShardedStrategy) -> None:
        self._strategy = strategy

    def no_backward_sync(self, module: nn.Module, enabled: bool) -> AbstractContextManager[Any]:
        stack = ExitStack()
        if enabled:
            for inner in self._strategy._reducers:
                stack.enter_context(self._strategy.accumulating(inner))
        return stack
