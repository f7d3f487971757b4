"""Import Megatron-core where it is served and nowhere else; recognise its classes without importing it."""

import sys
from types import ModuleType
from typing import Any

import torch
from torch import nn

from lightning_lora.compat.megatron import check_linear_product

SERVED = ((0, 14), (0, 20))  # versions, from and below
LAYERS = "megatron.core.tensor_parallel.layers"


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
