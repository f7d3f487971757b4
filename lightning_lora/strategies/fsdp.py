"""``FSDPLoRAStrategy``: the frozen base sharded with FSDP2, the adapters whole, one adapter-only checkpoint."""

import atexit
import inspect
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.fabric.utilities.distributed import (
    _distributed_is_initialized,
    _get_default_process_group_backend_for_device,
    _init_dist_connection,
    _sync_ddp_if_available,
)
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim import Optimizer
from typing_extensions import override

from lightning_lora.inject import injected_roots
from lightning_lora.sharded import is_sharded, reshard
from lightning_lora.strategies.adapter_only import AdapterOnly
from lightning_lora.strategies.gradients import GradientReducer, clip_by_norm, clip_by_value, drop_unused, watch_steps
from lightning_lora.strategies.rendezvous import store_of_this_attempt
from lightning_lora.strategies.sharding import (
    MIN_SHARD_NUMEL,
    ShardingOptions,
    broadcast_together,
    changing_buffers,
    check_keywords,
    replicated_parameters,
    set_gradient_sync,
    shard,
    sharded_trainables,
    shards_summary,
)

T = TypeVar("T")
_UNFROZEN = (
    "a base parameter was unfrozen after the base was sharded, and would not train: name its module in modules_to_save "
    "from the start, or use strategy='ddp' to unfreeze during a run"
)
_READ_IN_SHARDS = (
    "A base weight was read while it was in shards: outside the forward of the module that it is sharded with. Give "
    "the strategy shard_modules=[...] with a module whose forward is around the reading, or raise min_shard_numel, so "
    "that the tensor stays whole"
)


class FSDPLoRAStrategy(AdapterOnly, ParallelStrategy):
    """Shard the frozen base over all ranks with FSDP2 (``fully_shard``), block by block, and keep the adapters whole.

    A base parameter is gathered for the forward and the backward of its block and dropped again. The base has no
    gradients and so no gradient traffic; those of the adapters are averaged in one all-reduce per optimizer step.
    Checkpoints are the single adapter-only file of every other strategy, from and for any number of ranks; the base is
    never gathered for one. The user's LightningModule needs no code for any of this.

    The model stays in shards after the run: forward, ``generate``, ``merge`` and ``save_peft`` are then for all ranks
    together, in a script that still runs on all of them. To go on in one process, build the model anew and
    give it the checkpoint or the PEFT directory.

    Args:
        replicate_size: hybrid sharding: so many groups of ranks each hold the whole base between them, which keeps the
            gathering inside a node. It must divide the number of ranks.
        shard_modules: the modules to shard as one unit each, by class name or end of name (``["Block"]``), instead of
            the blocks that are found: transformers' ``_no_split_modules``, else the members of module lists.
        shard_adapters: shard the adapters too, and what else trains inside the pretrained model: for adapters that are
            too large to replicate. Their gradients are then reduce-scattered with their block.
        min_shard_numel: tensors outside the blocks with fewer elements stay whole. A small model's embeddings do.
        base_weights: a safetensors file, or a directory with one or with ``model.safetensors.index.json``, to fill a
            model from that was built under ``torch.device("meta")``. Each rank reads its own slices. The names in it
            are those inside the adapted model, which is the whole LightningModule unless it holds a transformers model
            or ``LoRACallback(module=...)`` names one. A transformers model that knows its local directory needs none.
        reshard_after_forward: drop a block's gathered weights after its forward, and gather them again for backward.
            ``False`` keeps them: one gather less per step, for the memory of the whole base.
        activation_checkpointing: keep only the inputs of the blocks for backward.
        compile: ``torch.compile`` the blocks; a string is the backend's name.
        cpu_offload: keep the base's shards in host memory.
        process_group_backend: ``"nccl"``, ``"gloo"``, ...; ``None`` takes the device's.
        timeout: of collectives.

    Raises:
        ValueError, TypeError: an option is wrong (at once), or the model cannot be served (at ``setup``).

    Example::

        trainer = L.Trainer(callbacks=[LoRACallback(r=8)], strategy="fsdp_lora", devices=8)
    """

    shards = True
    strategy_name = "fsdp_lora"

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
        self.num_nodes = 1
        self._process_group_backend = process_group_backend
        self._timeout = timeout
        self._device_mesh: DeviceMesh | None = None
        self._reducer = GradientReducer()
        self._buffers: list[Tensor] = []
        self._trained_in_shards: set[int] = set()

    @property
    def is_distributed(self) -> bool:
        """Whether Lightning gives each rank its own part of the data."""
        return True

    @property
    def device_mesh(self) -> DeviceMesh:
        """The ranks, as ``("data_parallel",)``, or ``("replicate", "data_parallel")`` under hybrid sharding."""
        if self._device_mesh is None:
            raise RuntimeError("there is no device mesh before the processes have found each other (setup_environment)")
        return self._device_mesh

    @property
    @override
    def root_device(self) -> torch.device:
        assert self.parallel_devices is not None
        return self.parallel_devices[self.local_rank]

    @property
    def num_processes(self) -> int:
        """Ranks on this node."""
        return len(self.parallel_devices) if self.parallel_devices is not None else 0

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        return {"num_replicas": self.world_size, "rank": self.global_rank}

    @property
    def process_group_backend(self) -> str | None:
        """Name of the backend of collectives."""
        return self._process_group_backend

    @property
    @override
    def restore_checkpoint_after_setup(self) -> bool:
        return True  # the tensors that a file is copied into are made there

    @override
    def _configure_launcher(self) -> None:
        assert self.cluster_environment is not None
        if not self.cluster_environment.creates_processes_externally:
            self._launcher = _SubprocessScriptLauncher(self.cluster_environment, self.num_processes, self.num_nodes)

    @override
    def setup_environment(self) -> None:
        super().setup_environment()
        self._process_group_backend = connect(self, self._process_group_backend, self._timeout)
        self._device_mesh = make_mesh(self.root_device, self.world_size, self.options.replicate_size)
        assert self.lightning_module is not None
        self.lightning_module._device_mesh = self._device_mesh

    def _set_world_ranks(self) -> None:
        set_world_ranks(self)

    @override
    def setup(self, trainer: "pl.Trainer") -> None:
        assert self.model is not None
        assert self.accelerator is not None
        self.accelerator.setup(trainer)
        check_adapted(self.model, self.strategy_name)
        evaluating = (trainer.fit_loop.epoch_loop.val_loop, trainer.validate_loop, trainer.test_loop)
        for loop in (*evaluating, trainer.predict_loop):
            loop.inference_mode = False  # FSDP2's first forward in it leaves tensors that cannot train
        self.model = self.precision_plugin.convert_module(self.model)
        shard(self.model, self.device_mesh, self.root_device, self.options, gathering_dtype(self.precision_plugin))
        rank_zero_info(shards_summary(self.model))
        self._buffers = changing_buffers(self.model)
        self.barrier()
        if trainer.state.fn == TrainerFn.FITTING:
            self._reducer.release()
            self._reducer = GradientReducer(replicated_parameters(self.model))
            self._clip_reduced()
            self.setup_optimizers(trainer)
            for optimizer in self.optimizers:
                watch_steps(optimizer, self._before_step)
            self._trained_in_shards = set(map(id, sharded_trainables(self.model)))
            if self._trained_in_shards:
                self._clip_over_ranks()
        self.setup_precision_plugin()

    @override
    def setup_optimizers(self, trainer: "pl.Trainer") -> None:
        self.optimizers, self.lr_scheduler_configs = [], []  # of an earlier fit
        super().setup_optimizers(trainer)

    def _before_step(self, optimizer: Optimizer, *, reduces: bool) -> None:
        """Reduce what would be stepped on unreduced, also of tensors that came into an optimizer during the run."""
        refuse_unfrozen(optimizer, self._trained_in_shards)
        self._take_in_unfrozen()
        assert self.lightning_module is not None
        if self._trained_in_shards and not self.options.reshard_after_forward:
            reshard(self.lightning_module)  # a forward since the backward left copies, which would outlive the step
        # Lightning hands every step a closure; under manual optimization one that does nothing
        if reduces or not self.lightning_module.automatic_optimization:
            self._reducer.before_step()

    def _take_in_unfrozen(self) -> None:
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        self._reducer.add(p for group in groups for p in group["params"] if not is_sharded(p))

    def _clip_reduced(self) -> None:
        plugin: Any = self.precision_plugin
        clip = plugin.clip_gradients

        def clip_gradients(*args: Any, **kwargs: Any) -> None:
            self._reducer.before_step()
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
    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        self._share_buffers()
        return super().validation_step(*args, **kwargs)

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
        self.pre_backward(closure_loss)
        assert self.lightning_module is not None
        closure_loss = self.precision_plugin.pre_backward(closure_loss, self.lightning_module)
        self.precision_plugin.backward(closure_loss, self.lightning_module, optimizer, *args, **kwargs)
        self._take_in_unfrozen()
        self._reducer.after_backward()
        if self._trained_in_shards and not self._reducer.is_blocked:
            drop_unused(self.lightning_module)
        closure_loss = self.precision_plugin.post_backward(closure_loss, self.lightning_module)
        self.post_backward(closure_loss)
        return closure_loss

    @contextmanager
    @override
    def block_backward_sync(self) -> Iterator[None]:
        """Let gradients accumulate on each rank, without communication."""
        assert self.model is not None
        with no_sync(self.model, self._reducer):
            yield

    @contextmanager
    @override
    def tensor_init_context(self, empty_init: bool | None = None) -> Iterator[None]:
        with torch.device("meta") if empty_init else nullcontext(), self.precision_plugin.tensor_init_context():
            yield

    @override
    def barrier(self, name: str | None = None) -> None:
        wait_for_all(self.root_device)

    @override
    def broadcast(self, obj: T, src: int = 0) -> T:
        return broadcast_object(obj, src)

    @override
    def reduce(self, tensor: Any, group: Any | None = None, reduce_op: Any = "mean") -> Any:
        return _sync_ddp_if_available(tensor, group, reduce_op=reduce_op) if isinstance(tensor, Tensor) else tensor

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        # the batch-size scaler draws another path on every rank
        super().save_checkpoint(checkpoint, self.broadcast(filepath), storage_options)

    @override
    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return super().load_checkpoint(self.broadcast(checkpoint_path), weights_only)

    @override
    def on_exception(self, exception: BaseException) -> None:
        unfrozen = self.model is not None and any(
            id(parameter) not in self._trained_in_shards for parameter in sharded_trainables(self.model)
        )
        explain_mixed_tensors(exception, _UNFROZEN if unfrozen else _READ_IN_SHARDS)
        super().on_exception(exception)

    @override
    def teardown(self) -> None:
        # the model stays where it is: its shards belong to this device
        assert self.cluster_environment is not None
        assert self.accelerator is not None
        self.cluster_environment.teardown()
        self._reducer.release()
        for name in ("clip_gradients", "clip_grad_by_norm", "clip_grad_by_value"):
            self.precision_plugin.__dict__.pop(name, None)
        self.precision_plugin.teardown()
        self.accelerator.teardown()
        self.checkpoint_io.teardown()


def connect(strategy: Any, backend: str | None, timeout: timedelta | None) -> str:
    """Bring this process into the group of all ranks; return the backend's name."""
    reset_seed()
    set_world_ranks(strategy)
    backend = backend or _get_default_process_group_backend_for_device(strategy.root_device)
    device_id = strategy.root_device if strategy.root_device.type != "cpu" else None
    kwargs: dict[str, Any] = {"timeout": timeout, "device_id": device_id}
    if not torch.distributed.is_initialized():
        kwargs |= store_of_this_attempt(strategy.global_rank, strategy.world_size, timeout)
        atexit.register(_disconnect)  # left to the interpreter's end, gloo's threads now and then abort the process
    _init_dist_connection(strategy.cluster_environment, backend, **kwargs)
    return backend


def _disconnect() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def set_world_ranks(strategy: Any) -> None:
    """Tell the cluster environment which rank this process is, unless it knows better."""
    environment = strategy.cluster_environment
    if environment is not None:
        environment.set_global_rank(strategy.node_rank * strategy.num_processes + strategy.local_rank)
        environment.set_world_size(strategy.num_nodes * strategy.num_processes)
    vars(rank_zero_only)["rank"] = strategy.global_rank


def make_mesh(device: torch.device, world_size: int, replicate_size: int) -> DeviceMesh:
    """Return the mesh of all ranks: one dimension, or replicas of shards."""
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"'fsdp_lora' runs on CUDA devices and on CPU, not on {device.type!r}")
    if "ignored_params" not in inspect.signature(fully_shard).parameters:
        raise ValueError(f"'fsdp_lora' needs torch 2.7 or newer; this is {torch.__version__}")
    if world_size % replicate_size:
        raise ValueError(f"replicate_size={replicate_size} does not divide the {world_size} ranks")
    if replicate_size == 1:
        return init_device_mesh(device.type, (world_size,), mesh_dim_names=("data_parallel",))
    shape = (replicate_size, world_size // replicate_size)
    return init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "data_parallel"))


def check_adapted(model: nn.Module, name: str) -> None:
    """Raise ``ValueError`` for a model without adapters."""
    if not injected_roots(model):
        raise ValueError(
            f"{name!r} shards the frozen base of an adapted model, and {type(model).__name__} holds no adapters: add "
            "LoRACallback(...) to the Trainer's callbacks, or call inject(model, LoRAConfig(...)) first"
        )


def gathering_dtype(precision: Any) -> torch.dtype | None:
    """Return the dtype that mixed precision gathers base weights in, or ``None`` for their own."""
    name = str(getattr(precision, "precision", ""))
    return {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(name)


def refuse_unfrozen(optimizer: Optimizer, served: set[int]) -> None:
    """Raise ``ValueError`` for an optimizer with parameters that were frozen when they were sharded.

    Args:
        served: identities of those that trained then.
    """
    for group in optimizer.param_groups:
        if any(is_sharded(p) and p.requires_grad and id(p) not in served for p in group["params"]):
            raise ValueError(_UNFROZEN)


@contextmanager
def no_sync(model: nn.Module, reducer: GradientReducer) -> Iterator[None]:
    """Let gradients accumulate on each rank inside the block."""
    spread = bool(sharded_trainables(model))
    if spread:
        set_gradient_sync(model, False)
    try:
        with reducer.no_sync():
            yield
    finally:
        if spread:
            set_gradient_sync(model, True)


def wait_for_all(device: torch.device) -> None:
    """Wait until all ranks are here."""
    if _distributed_is_initialized():
        on_gpu = torch.distributed.get_backend() == "nccl"
        torch.distributed.barrier(device_ids=[device.index] if on_gpu else None)


def broadcast_object(obj: T, src: int) -> T:
    """Return rank ``src``'s object."""
    if not _distributed_is_initialized():
        return obj
    objects = [obj]
    torch.distributed.broadcast_object_list(objects, src)
    return objects[0]


def explain_mixed_tensors(exception: BaseException, advice: str) -> None:
    """Add to torch's error about a sharded tensor beside a whole one what to do about it."""
    if exception.args and "mixed torch.Tensor and DTensor" in str(exception.args[0]):
        exception.args = (f"{exception.args[0]} {advice}", *exception.args[1:])
