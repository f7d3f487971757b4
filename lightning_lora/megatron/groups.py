"""Megatron-core's process groups: which ranks share a model, and which see other data."""

from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torchmetrics import Metric
from torchmetrics.utilities.distributed import gather_all_tensors

from lightning_lora.megatron.core import parallel_state

_MESHES: dict[Any, DeviceMesh] = {}


def tensor_parallel() -> tuple[int, int]:
    """Return this rank's place among those that share the model, and their number.

    Raises:
        ValueError: Megatron-core has no process groups yet, or splits models in other ways, too.
    """
    state = parallel_state()
    if not state.model_parallel_is_initialized():
        raise ValueError(
            "Megatron-core's process groups are not set up, and a GPTModel is built for them: build and fill it in "
            "configure_model(), where strategy='megatron_lora' has done so (no other strategy does), or call "
            "parallel_state.initialize_model_parallel() first. To use a trained adapter without them, "
            "convert(checkpoint, directory) writes it for Hugging Face's model"
        )
    size = state.get_tensor_model_parallel_world_size()
    served = {
        "pipeline_model_parallel_size": (state.get_pipeline_model_parallel_world_size(), 1),
        "expert_model_parallel_size": (state.get_expert_model_parallel_world_size(), 1),
        "expert_tensor_parallel_size": (state.get_expert_tensor_parallel_world_size(), size),
    }
    for name, (found, expected) in served.items():
        if found != expected:
            raise ValueError(f"{name}={found} is not served with tensor_model_parallel_size={size}: use {expected}")
    return state.get_tensor_model_parallel_rank(), size


def mesh_of(group: Any, device_type: str) -> DeviceMesh:
    """Return the one-dimensional mesh of a process group, the same object on every call."""
    if group not in _MESHES:
        _MESHES[group] = DeviceMesh.from_group(group, device_type)
    return _MESHES[group]


def count_batches_once(module: nn.Module) -> None:
    """Make the metrics inside a module sync over data-parallel ranks, unless the user set how they sync.

    A batch is then counted once, not once for every rank that shares a model.
    """
    for part in module.modules():
        metric: Any = part
        # isinstance asks all subclasses of an abstract class about every type: 0.4 s for those of torchmetrics
        if Metric in type(part).__mro__ and metric.dist_sync_fn is None and metric.process_group is None:
            metric.dist_sync_fn = _gather_over_data


def _gather_over_data(result: Tensor, group: Any = None) -> list[Tensor]:
    """Return the tensors of all ranks of ``group``, or without one, of all data-parallel ranks.

    As a ``dist_sync_fn`` it may be copied and pickled with its metric, which a process group may not.
    """
    if group is None and parallel_state().model_parallel_is_initialized():
        group = parallel_state().get_data_parallel_group()
    gathered: list[Tensor] = gather_all_tensors(result, group)
    return gathered
