"""Megatron-core where it is served and nowhere else: its import, its process groups, and its classes."""

import sys
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torchmetrics import Metric
from torchmetrics.utilities.distributed import gather_all_tensors

from lightning_lora.compat.megatron import check_linear_product

SERVED = ((0, 14), (0, 20))  # versions, from and below
LAYERS = "megatron.core.tensor_parallel.layers"
_MESHES: dict[Any, DeviceMesh] = {}


def megatron_core() -> ModuleType:
    """Return ``megatron.core``.

    Its import lets safe loads of checkpoints build objects of its own and others (paths, namespaces, arrays). That is
    taken back: what a file may hold does not depend on the strategy.

    Raises:
        ImportError: it is missing or of a version that is not served.
    """
    first, last = (".".join(map(str, version)) for version in SERVED)
    remedy = f'pip install "megatron-core>={first},<{last}"'
    is_new, allowed = "megatron.core" not in sys.modules, torch.serialization.get_safe_globals()
    try:
        import megatron.core
        from megatron.core.package_info import MAJOR, MINOR, __version__
    except ImportError as error:
        raise ImportError(f"'megatron_lora' needs megatron-core: {remedy}") from error
    if is_new:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(allowed)
    if not SERVED[0] <= (MAJOR, MINOR) < SERVED[1]:
        raise ImportError(f"'megatron_lora' serves megatron-core {first} to {last}, found {__version__}: {remedy}")
    core: ModuleType = megatron.core
    return core


def parallel_state() -> Any:
    """Return Megatron-core's record of the process groups."""
    megatron_core()
    from megatron.core import parallel_state

    return parallel_state


def rank_and_size() -> tuple[int, int]:
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


def collectives() -> Any:
    """Return ``megatron.core.tensor_parallel``: what communicates in forward and backward, and its random states."""
    from megatron.core import tensor_parallel

    return tensor_parallel


def check_contract() -> None:
    """Raise ``ImportError`` where Megatron-core's linear layers have no local product of their own to adapt."""
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

    check_linear_product(ColumnParallelLinear)
    check_linear_product(RowParallelLinear)


def is_gpt(module: nn.Module) -> bool:
    """Whether this is a ``GPTModel``. Before Megatron-core is imported there is none."""
    return _is_a(module, "megatron.core.models.gpt.gpt_model", "GPTModel")


def is_parallel_linear(module: nn.Module) -> bool:
    """Whether this is a linear layer of Megatron-core."""
    return _is_a(module, LAYERS, "ColumnParallelLinear", "RowParallelLinear")


def is_column(module: nn.Module) -> bool:
    """Whether this is a column-parallel layer of Megatron-core."""
    return _is_a(module, LAYERS, "ColumnParallelLinear")


def is_vocabulary(module: nn.Module) -> bool:
    """Whether this is an embedding of Megatron-core whose rows are spread over ranks."""
    return _is_a(module, LAYERS, "VocabParallelEmbedding")


def _is_a(module: nn.Module, path: str, *classes: str) -> bool:
    found = sys.modules.get(path)
    return found is not None and isinstance(module, tuple(getattr(found, name) for name in classes))
