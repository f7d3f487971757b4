"""Name the parameters that train outside the adapted model, which no PEFT directory holds."""

from collections.abc import Iterable
from typing import Any

from lightning.fabric.utilities.rank_zero import rank_zero_info
from torch import nn

from lightning_lora.model.names import clean_name, is_inside, listed


def outside_names(names: Iterable[str], *paths: str) -> list[str]:
    """Return the outermost modules of the tensors (clean ``names``) that lie in none of the roots ``paths``."""
    found: dict[str, None] = {}
    for name in names:
        if not any(is_inside(name, path) for path in paths):
            parts = name.split(".")
            outermost = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
            found[next(outer for outer in outermost if not any(is_inside(path, outer) for path in paths))] = None
    return list(found)


def trained_outside(module: nn.Module, path: str, root: nn.Module) -> list[str]:
    """Return what trains in ``module`` outside of its adapted model ``root``, by outermost modules and parameters."""
    inside = {id(parameter) for parameter in root.parameters()}
    named = module.named_parameters()
    return outside_names((clean_name(n) for n, p in named if p.requires_grad and id(p) not in inside), path)


def say_left_out(directory: Any, names: list[str], where: str) -> None:
    """Log on rank 0 which trained tensors a PEFT directory lacks, if any, and where they are."""
    if names:
        rank_zero_info(
            f"{directory} holds the adapter alone: no PEFT directory has a place for what trains outside the adapted "
            f"model, {listed(names)}. {where}"
        )
