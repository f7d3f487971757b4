"""What trains outside an adapted model, which no PEFT directory holds: said in one line where one is written."""

from collections.abc import Iterable
from typing import Any

from lightning.fabric.utilities.rank_zero import rank_zero_info
from torch import nn

from lightning_lora.messages import listed
from lightning_lora.root import clean_name, is_inside


def outside_names(names: Iterable[str], *paths: str) -> list[str]:
    """Return, of tensors' clean names, those that lie in none of the roots ``paths``, by their outermost modules."""
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
    """Say what a PEFT directory does not hold, if anything, and where it is. On rank 0 alone."""
    if names:
        rank_zero_info(
            f"{directory} holds the adapter alone: no PEFT directory has a place for what trains outside the adapted "
            f"model, {listed(names)}. {where}"
        )
