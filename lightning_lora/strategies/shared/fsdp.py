"""Options, ranks and refusals of ``fsdp_lora``, for Trainer and Fabric."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.optim import Optimizer
from typing_extensions import override

from lightning_lora.checkpoint.optimizer_matching import names_of
from lightning_lora.distributed.gradients import GradientReducer
from lightning_lora.distributed.sharded_gradients import drop_unused, set_gradient_sync, sharded_trainables
from lightning_lora.distributed.sharding import MIN_SHARD_NUMEL, ShardingOptions, shard
from lightning_lora.model.own_parameters import owners
from lightning_lora.model.spread import reshard
from lightning_lora.model.state import injected_roots
from lightning_lora.model.summary import drops_layers
from lightning_lora.ops.sharded import is_sharded
from lightning_lora.strategies.shared.launched import check_keywords
from lightning_lora.strategies.shared.sharded import Sharded

UNFROZEN = (
    "a base parameter was unfrozen after the base was sharded, and would not train: name its module in modules_to_save "
    "from the start, or use strategy='ddp' to unfreeze during a run"
)


class FSDPRanks(Sharded):
    """Mixin of the strategies for Trainer and Fabric: their options, the ranks as a mesh, sharding a model over it."""

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
        check_keywords(type(self), kwargs, self._lightning_base)
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
        self.splits_adapters = shard_adapters
        self._process_group_backend = process_group_backend
        self._timeout = timeout
        self._trained_in_shards: set[int] = set()

    def refuse_layerdrop(self, model: nn.Module) -> None:
        """Raise ``ValueError`` for a model with layerdrop: each rank would skip, and so not gather, other layers."""
        if self.device_mesh.size() == 1:
            return
        for root in injected_roots(model).values():
            for name, probability in drops_layers(root).items():
                raise ValueError(
                    f"{name or type(root).__name__!r} has layerdrop={probability:g}, so each rank would skip "
                    "other layers, and all ranks gather each layer's weights together: set layerdrop to 0 in the "
                    "model's config (from_pretrained(..., layerdrop=0.0); encoder_layerdrop and decoder_layerdrop "
                    "where it has them), or use strategy='ddp'"
                )

    def setup_environment(self) -> None:
        """Find the other ranks and lay them out: ``("data_parallel",)``, or ``("replicate", "data_parallel")``."""
        super().setup_environment()  # type: ignore[misc]  # Lightning's
        self._connect()
        world_size = torch.distributed.get_world_size()
        self._device_mesh = make_mesh(self.root_device, world_size, self.options.replicate_size)

    @override
    def place(self, model: nn.Module) -> None:
        shard(model, self.device_mesh, self.root_device, self.options, gathering_dtype(self.own_precision))

    @override
    def make_reducers(self, model: nn.Module) -> list[GradientReducer]:
        self.refuse_layerdrop(model)
        self._trained_in_shards |= set(map(id, sharded_trainables(model)))
        return [GradientReducer(model.parameters(), names=names_of(model), owners=owners(model))]

    @override
    def _before_step(self, optimizer: Optimizer, *, reduces: bool) -> None:
        refuse_unfrozen(optimizer, self._trained_in_shards)
        if self._trained_in_shards and not self.options.reshard_after_forward:
            for model in self._reducers:
                reshard(model)  # a forward since the backward left copies, which would outlive the step
        super()._before_step(optimizer, reduces=reduces)

    @override
    def after_reduction(self, model: nn.Module) -> None:
        if self._trained_in_shards:
            drop_unused(model)

    @contextmanager
    @override
    def accumulating(self, model: nn.Module) -> Iterator[None]:
        spread = bool(sharded_trainables(model))
        if spread:
            set_gradient_sync(model, False)
        try:
            with super().accumulating(model):
                yield
        finally:
            if spread:
                set_gradient_sync(model, True)


def make_mesh(device: torch.device, world_size: int, replicate_size: int) -> DeviceMesh:
    """Return the mesh of all ranks: one dimension, or replicas of shards."""
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"'fsdp_lora' runs on CUDA devices and on CPU, not on {device.type!r}")
    if "ignored_params" not in inspect.signature(fully_shard).parameters or not hasattr(
        FSDPModule, "set_unshard_in_backward"
    ):
        raise ValueError(f"'fsdp_lora' needs a newer torch than {torch.__version__}; it is tested with 2.12 to 2.14")
    if world_size % replicate_size:
        raise ValueError(f"replicate_size={replicate_size} does not divide the {world_size} ranks")
    if replicate_size == 1:
        return init_device_mesh(device.type, (world_size,), mesh_dim_names=("data_parallel",))
    shape = (replicate_size, world_size // replicate_size)
    return init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "data_parallel"))


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
            raise ValueError(UNFROZEN)
