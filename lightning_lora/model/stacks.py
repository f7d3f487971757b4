"""Find the 3-D parameters that stack the matrices of experts, and decide which of them are packed."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import nn

from lightning_lora.fuse.expert_kinds import Recognised, recognise
from lightning_lora.model.matching import hits
from lightning_lora.model.names import is_inside, joined
from lightning_lora.ops.packed import PackedWeight
from lightning_lora.ops.packed_stack import can_stack


class Stacks(NamedTuple):
    """Names of the parameters that are packed, and those that are not, each with the reason."""

    packed: tuple[str, ...]
    left_out: dict[str, str]


def find_stacks(
    modules: Mapping[str, nn.Module],
    form: type[PackedWeight],
    exclude: str | Sequence[str] | None,
    keep: Mapping[str, str],
) -> Stacks:
    """Return which stacks of a model are packed in a form: all that a module has, or none of them.

    Args:
        keep: modules that stay as they are, each with the reason.
    """
    packed: list[str] = []
    left_out: dict[str, str] = {}
    holders = Counter(id(p) for module in modules.values() for p in module._parameters.values() if p is not None)
    for name, module in modules.items():
        stacks = {
            local: parameter
            for local, parameter in module._parameters.items()
            if parameter is not None and parameter.ndim == 3 and not type(module).__module__.startswith("torch.nn.")
        }
        names = [joined(name, local) for local in stacks]
        why = next((reason for path, reason in keep.items() if is_inside(name, path)), None)
        if is_excluded(exclude, name):
            why = "excluded"
        elif stacks and why is None:
            why = _reason(module, stacks, form, holders)
        if why is None:
            packed += names
        else:
            left_out |= dict.fromkeys(names, why)
    return Stacks(tuple(packed), left_out)


def known_experts(module: nn.Module) -> Recognised | None:
    """Return what a module computes if it holds the matrices of experts and computes what transformers' experts do."""
    return recognise(module, type(module), list(module._parameters))


def is_excluded(exclude: str | Sequence[str] | None, name: str) -> bool:
    """Whether ``exclude`` names a module or one around it."""
    parts = name.split(".")
    return any(hits(exclude, ".".join(parts[: end + 1])) for end in range(len(parts)))


def _reason(
    module: nn.Module, stacks: Mapping[str, nn.Parameter], form: type[PackedWeight], holders: Mapping[int, int]
) -> str | None:
    """Return why the stacks of a module cannot be packed, or ``None``."""
    known = known_experts(module)
    if known is None or set(stacks) != set(known.names.matrices):
        return "stack of matrices that the model's own code multiplies"
    if not all(can_stack(form, parameter.shape) for parameter in stacks.values()):
        return "stack of experts' matrices whose sizes are no multiples of a block"
    if any(holders[id(parameter)] > 1 for parameter in stacks.values()):
        return "shares its weight"
    return None
