"""Private names of torch.distributed: process groups, DTensor, DDP, FSDP2."""

from typing import Any

import torch
from torch import nn

from lightning_lora.compat.lookup import private


def default_store() -> Any:
    """Return the key-value store of the default process group. Relies on torch's own function; without it raises."""
    return private("torch", torch.distributed.distributed_c10d, "_get_default_store")()


def striped_shard(dim: int, stripes: int) -> Any:
    """Return a placement in which each rank has its share of every stripe. Relies on DTensor's; without it raises."""
    return _striped_class()(dim, split_factor=stripes)


def is_striped(placement: Any) -> bool:
    """Whether a placement is one of :func:`striped_shard`."""
    return isinstance(placement, _striped_class())


def _striped_class() -> Any:
    return private("torch", "torch.distributed.tensor.placement_types", "_StridedShard")


def local_box(tensor: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return shape and offset of this rank's part of a DTensor. Relies on DTensor's function; without it raises."""
    compute = private("torch", "torch.distributed.tensor._utils", "compute_local_shape_and_global_offset")
    shape, offset = compute(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(shape), tuple(offset)


def is_fsdp(module: Any) -> bool:
    """Whether FSDP2 shards a module. Relies on a method that it adds; without it no module counts as sharded."""
    return hasattr(module, "_get_fsdp_state")


def fsdp_groups(module: Any) -> list[Any]:
    """Return FSDP2's groups of the parameters that it gathers for a module. Relies on its state; without it raises.

    The list is FSDP2's own: removing a group makes FSDP2 gather it no more.
    """
    groups: list[Any] = private("torch", _fsdp_state(module), "_fsdp_param_groups")
    return groups


def _fsdp_state(module: Any) -> Any:
    return private("torch", module, "_get_fsdp_state")()


def make_fsdp_root(module: Any) -> None:
    """Make a module the root of FSDP2's modules inside. Relies on FSDP2's state; without it raises.

    By itself FSDP2 takes the first module that runs for the root.
    """
    private("torch", _fsdp_state(module), "_lazy_init")()


def gathered_parameter(record: Any) -> nn.Parameter | None:
    """Return the whole parameter that FSDP2 gathered, if it did once. Relies on its record; without it none."""
    parameter: nn.Parameter | None = getattr(record, "_unsharded_param", None)
    return parameter


def set_parameters(group: Any, records: list[Any]) -> None:
    """Give a group of FSDP2 fewer parameters to gather. Relies on its methods; without them raises."""
    group.fsdp_params[:] = records
    if records:
        private("torch", group, "_init_mp_dtypes")()


def gather_once(module: Any) -> None:
    """Gather and drop a module's weights as its forward would. Relies on FSDP2's training state; else raises."""
    states = private("torch", "torch.distributed.fsdp._fully_shard._fsdp_common", "TrainingState")
    for group in fsdp_groups(module):
        group.lazy_init()
        group._training_state = states.FORWARD  # in which it keeps what a forward would keep
        group.unshard()
        group.wait_for_unshard()
        group.reshard()
        group._training_state = states.IDLE


def sync_buffers(model: nn.parallel.DistributedDataParallel) -> None:
    """Give all ranks rank 0's buffers, as DDP does before a forward. Relies on its method; without it raises."""
    private("torch", model, "_sync_buffers")()
