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

from lightning_lora.distributed.gradients import GradientReducer
from lightning_lora.distributed.sharding import (
    MIN_SHARD_NUMEL,
    ShardingOptions,
    set_gradient_sync,
    sharded_trainables,
)
from lightning_lora.model.layerdrop import drops_layers
from lightning_lora.model.state import injected_roots
from lightning_lora.ops.sharded import is_sharded
from lightning_lora.strategies.shared.launched import Launched, check_keywords

UNFROZEN = (
    "a base parameter was unfrozen after the base was sharded, and would not train: name its module in modules_to_save "
    "from the start, or use strategy='ddp' to unfreeze during a run"
)


class FSDPRanks(Launched):
    """Mixin of the strategies for Trainer and Fabric: their options, and the ranks as a mesh."""

    shards = True
    _lightning_base: type[Any]

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
