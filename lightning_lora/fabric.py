"""The strategies for Fabric: twins of those for the Trainer, with the same options and the same files."""

from contextlib import AbstractContextManager, ExitStack
from datetime import timedelta
from typing import Any, TypeVar

import torch
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.fabric.strategies import ParallelStrategy
from lightning.fabric.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from lightning.fabric.strategies.strategy import _BackwardSyncControl
from lightning.fabric.utilities.distributed import _sync_ddp_if_available
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer
from torch.utils.weak import WeakTensorKeyDictionary
from typing_extensions import override

from lightning_lora.sharded import reshard
from lightning_lora.strategies.fabric import FabricAdapterOnly
from lightning_lora.strategies.fsdp import (
    broadcast_object,
    check_adapted,
    connect,
    gathering_dtype,
    make_mesh,
    no_sync,
    refuse_unfrozen,
    set_world_ranks,
    wait_for_all,
)
from lightning_lora.strategies.gradients import GradientReducer, clip_by_norm, clip_by_value, drop_unused, watch_steps
from lightning_lora.strategies.optimizers import follow_parameters
from lightning_lora.strategies.sharding import (
    MIN_SHARD_NUMEL,
    ShardingOptions,
    broadcast_together,
    changing_buffers,
    check_keywords,
    replicated_parameters,
    shard,
    sharded_trainables,
)

T = TypeVar("T")


class FSDPLoRAStrategy(FabricAdapterOnly, ParallelStrategy):
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

    shards = True

    def __init__(
        self,
        replicate_size: int = 1,
        shard_modules: list[str] | None = None,
        shard_adapters: bool = False,
        min_shard_numel: int = MIN_SHARD_NUMEL,
        base_weights: str | None = None,
        reshard_after_forward: bool = True,
        activation_checkpointing: bool = False,
        compile: bool | str = False,
        cpu_offload: bool = False,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
        **kwargs: Any,
    ) -> None:
        check_keywords(FSDPLoRAStrategy, kwargs, ParallelStrategy.__init__)
        super().__init__(**kwargs)
        self.options = ShardingOptions(
            replicate_size=replicate_size,
            shard_modules=shard_modules,
            shard_adapters=shard_adapters,
            min_shard_numel=min_shard_numel,
            base_weights=base_weights,
            reshard_after_forward=reshard_after_forward,
            activation_checkpointing=activation_checkpointing,
            compile=compile,
            cpu_offload=cpu_offload,
        )
        self._num_nodes = 1
        self._process_group_backend = process_group_backend
        self._timeout = timeout
        self._device_mesh: DeviceMesh | None = None
        # one for each module: what is summed where must not depend on the company
        self._reducers: dict[nn.Module, GradientReducer] = {}
        self._trained_in_shards: set[int] = set()
        self._replaced = WeakTensorKeyDictionary()  # what trained before sharding put another in its place
        self._backward_sync_control = _NoSync(self)

    @property
    def device_mesh(self) -> DeviceMesh:
        """The ranks, as ``("data_parallel",)``, or ``("replicate", "data_parallel")`` under hybrid sharding."""
        if self._device_mesh is None:
            raise RuntimeError("there is no device mesh before fabric.launch()")
        return self._device_mesh

    @property
    @override
    def root_device(self) -> torch.device:
        assert self.parallel_devices is not None
        return self.parallel_devices[self.local_rank]

    @property
    def num_nodes(self) -> int:
        """Nodes of the run."""
        return self._num_nodes

    @property
    def num_processes(self) -> int:
        """Ranks on this node."""
        return len(self.parallel_devices) if self.parallel_devices is not None else 0

    @override
    def _configure_launcher(self) -> None:
        assert self.cluster_environment is not None
        if not self.cluster_environment.creates_processes_externally:
            self._launcher = _SubprocessScriptLauncher(self.cluster_environment, self.num_processes, self.num_nodes)

    def _set_world_ranks(self) -> None:
        set_world_ranks(self)

    @override
    def setup_environment(self) -> None:
        super().setup_environment()
        self._process_group_backend = connect(self, self._process_group_backend, self._timeout)
        self._device_mesh = make_mesh(self.root_device, self.world_size, self.options.replicate_size)

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
        return _sync_ddp_if_available(tensor, group, reduce_op=reduce_op) if isinstance(tensor, Tensor) else tensor

    @override
    def barrier(self, *args: Any, **kwargs: Any) -> None:
        wait_for_all(self.root_device)

    @override
    def broadcast(self, obj: T, src: int = 0) -> T:
        return broadcast_object(obj, src)


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
