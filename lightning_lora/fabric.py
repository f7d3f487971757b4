"""The strategies for Fabric: twins of those for the Trainer, with the same options and the same files."""

from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from lightning.fabric.strategies import ParallelStrategy
from lightning.fabric.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from lightning.fabric.strategies.strategy import _BackwardSyncControl
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.weak import WeakTensorKeyDictionary
from typing_extensions import override

from lightning_lora.sharded import reshard
from lightning_lora.strategies.fabric import FabricAdapterOnly
from lightning_lora.strategies.fsdp import FSDPRanks, gathering_dtype, no_sync, refuse_unfrozen
from lightning_lora.strategies.gradients import GradientReducer, clip_by_norm, clip_by_value, drop_unused, watch_steps
from lightning_lora.strategies.launched import check_adapted, reduced
from lightning_lora.strategies.optimizers import follow_parameters
from lightning_lora.strategies.replication import broadcast_together, changing_buffers
from lightning_lora.strategies.sharding import replicated_parameters, shard, sharded_trainables


class FSDPLoRAStrategy(FSDPRanks, FabricAdapterOnly, ParallelStrategy):
    """Shard the frozen base over all ranks with FSDP2 and keep the adapters whole; the twin for Fabric.

    The arguments are those of :class:`lightning_lora.FSDPLoRAStrategy`. ``fabric.setup(model, optimizer)`` takes the
    adapted model and an optimizer that was made for it before; ``fabric.no_backward_sync`` accumulates without
    communication.

    Example::

        fabric = Fabric(strategy="fsdp_lora", devices=2)
        fabric.launch()
        model = inject(model, LoRAConfig(r=8))
        model, optimizer = fabric.setup(model, torch.optim.AdamW(p for p in model.parameters() if p.requires_grad))
    """

    _launcher_class = _SubprocessScriptLauncher
    _lightning_base = ParallelStrategy

    @override
    def setup_environment(self) -> None:
        super().setup_environment()
        # one for each module: what is summed where must not depend on the company
        self._reducers: dict[nn.Module, GradientReducer] = {}
        self._replaced = WeakTensorKeyDictionary()  # what trained before sharding put another in its place
        self._backward_sync_control = _NoSync(self)

    @override
    def setup_module(self, module: nn.Module) -> nn.Module:
        check_adapted(module, "fsdp_lora")
        before = dict(module.named_parameters())
        shard(module, self.device_mesh, self.root_device, self.options, gathering_dtype(self.precision))
        if module in self._reducers:
            self._reducers[module].release()
        self._reducers[module] = GradientReducer(replicated_parameters(module))
        self._trained_in_shards |= set(map(id, sharded_trainables(module)))
        after = dict(module.named_parameters())
        self._replaced.update({p: None for name, p in before.items() if p.requires_grad and after[name] is not p})
        buffers = changing_buffers(module)
        if buffers:  # rank 0's running statistics for every rank, as under DDP
            module.register_forward_pre_hook(lambda *_: broadcast_together(buffers, self.root_device))
        return module

    @override
    def setup_module_and_optimizers(
        self, module: nn.Module, optimizers: list[Optimizer], scheduler: Any = None
    ) -> tuple[nn.Module, list[Optimizer], Any]:
        """Shard a module; its optimizers follow it to the parameters that it has then, and drop the frozen ones."""
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
        watch_steps(optimizer, self._before_step)
        return super().setup_optimizer(optimizer)

    def _before_step(self, optimizer: Optimizer, *, reduces: bool) -> None:
        refuse_unfrozen(optimizer, self._trained_in_shards)
        if self._trained_in_shards and not self.options.reshard_after_forward:
            for module in self._reducers:
                reshard(module)  # a forward since the backward left copies, which would outlive the step
        if reduces:
            self._reduce_pending()

    def _reduce_pending(self) -> None:
        for reducer in self._reducers.values():
            reducer.before_step()

    @override
    def module_to_device(self, module: nn.Module) -> None:
        """Do nothing: sharding brings each part to its device."""

    @override
    def module_init_context(self, empty_init: bool | None = None) -> AbstractContextManager[Any]:
        stack = ExitStack()
        if empty_init:
            stack.enter_context(torch.device("meta"))
        stack.enter_context(self.precision.module_init_context())
        return stack

    @override
    def backward(self, tensor: Tensor, module: nn.Module | None, *args: Any, **kwargs: Any) -> None:
        super().backward(tensor, module, *args, **kwargs)
        for own, reducer in self._reducers.items():
            reducer.add(replicated_parameters(own))  # some may have been unfrozen
            reducer.after_backward()
            if self._trained_in_shards and not reducer.is_blocked:
                drop_unused(own)

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
        return clip_by_norm(self.precision.main_params(optimizer), max_norm, norm_type, error_if_nonfinite)

    @override
    def clip_gradients_value(self, module: nn.Module, optimizer: Optimizer, clip_val: float | int) -> None:
        self._reduce_pending()
        self.precision.unscale_gradients(optimizer)
        clip_by_value(self.precision.main_params(optimizer), clip_val)

    @override
    def all_reduce(self, tensor: Any, group: Any | None = None, reduce_op: Any = "mean") -> Any:
        return reduced(tensor, group, reduce_op)


class _NoSync(_BackwardSyncControl):
    """Accumulate gradients on each rank, without communication."""

    def __init__(self, strategy: FSDPLoRAStrategy) -> None:
        self._strategy = strategy

    @override
    def no_backward_sync(self, module: nn.Module, enabled: bool) -> AbstractContextManager[Any]:
        stack = ExitStack()
        if enabled:
            for inner, reducer in self._strategy._reducers.items():
                stack.enter_context(no_sync(inner, reducer))
        return stack
