"""Let torchmetrics count a batch once under tensor parallelism, not once for every rank that shares a model."""

from typing import Any

from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.utilities.distributed import gather_all_tensors

from lightning_lora.megatron.core import parallel_state


def gather_over_data(result: Tensor, group: Any = None) -> list[Tensor]:
    """Return the tensors of all ranks of ``group``, or without one, of all data-parallel ranks.

    As a ``dist_sync_fn`` it may be copied and pickled with its metric, which a process group may not.
    """
    if group is None and parallel_state().model_parallel_is_initialized():
        group = parallel_state().get_data_parallel_group()
    gathered: list[Tensor] = gather_all_tensors(result, group)
    return gathered


def count_batches_once(module: nn.Module) -> None:
    """Make the metrics inside a module sync over data-parallel ranks, unless the user set how they sync."""
    metrics: list[Any] = [part for part in module.modules() if _is_metric(part)]
    for metric in metrics:
        if metric.dist_sync_fn is None and metric.process_group is None:
            metric.dist_sync_fn = gather_over_data


def _is_metric(part: nn.Module) -> bool:
    # isinstance asks all subclasses of an abstract class about every type: 0.4 s for those of torchmetrics
    return Metric in type(part).__mro__
