"""Gather whole copies of parameters that FSDP2 shards, drop them, and stop gathering what was taken out."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from lightning_lora.compat.distributed import fsdp_groups, is_fsdp, set_parameters
from lightning_lora.ops.sharded import is_sharded, whole


def sharded_parameters(module: Any) -> list[Any]:
    """Return FSDP2's records of the parameters that it gathers for this very module; none for any other module."""
    if not is_fsdp(module):
        return []
    return [parameter for group in fsdp_groups(module) for parameter in group.fsdp_params]


def stop_gathering(root: nn.Module, parameters: set[int]) -> None:
    """Make FSDP2 stop gathering parameters that were taken out of ``root``: it would put them back at the next forward.

    Args:
        parameters: identities of what is gone, as it is in shards.
    """
    for part in root.modules():
        groups = fsdp_groups(part) if is_fsdp(part) else []
        for group in list(groups):
            kept = [one for one in group.fsdp_params if id(one.sharded_param) not in parameters]
            if len(kept) == len(group.fsdp_params):
                continue
            set_parameters(group, kept)
            if not kept:
                groups.remove(group)


def class_name(module: nn.Module) -> str:
    """Return the name of a module's class, without the prefix of the class that FSDP2 makes of it."""
    cls = type(module)
    return cls.__name__.removeprefix("FSDP") if is_fsdp(module) else cls.__name__


def reshard(module: nn.Module) -> None:
    """Drop the gathered copies that FSDP2 keeps after a forward, so that the parameters are the stored ones."""
    for part in module.modules():
        if callable(getattr(part, "reshard", None)) and is_fsdp(part):
            part.reshard()  # type: ignore[operator]  # an FSDPModule


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Hold whole copies of ``module``'s own and its children's sharded parameters inside the block, for reading.

    Called on all ranks; gathers each parameter once. The copies are dropped at the end.
    """
    swapped: list[tuple[nn.Module, str, nn.Parameter]] = []
    copies: dict[int, nn.Parameter] = {}
    try:
        for part in module.modules():
            for name, parameter in part._parameters.items():
                if parameter is not None and is_sharded(parameter):
                    if id(parameter) not in copies:
                        copies[id(parameter)] = nn.Parameter(whole(parameter).detach(), parameter.requires_grad)
                    swapped.append((part, name, parameter))
        for part, name, parameter in swapped:
            part._parameters[name] = copies[id(parameter)]
        yield
    finally:
        for part, name, parameter in swapped:
            part._parameters[name] = parameter
