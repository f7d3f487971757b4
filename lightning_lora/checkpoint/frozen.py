"""Leave frozen tensors out of checkpoints until their values change.

Teachers and target networks follow the model without requiring grad, and often only their values show it: writing
through ``.data``, replacing it, and fused kernels do not increase a tensor's version. So all bytes are hashed when a
run begins and at each save.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from lightning_lora.checkpoint.comparison import first_other_name
from lightning_lora.checkpoint.file import named_persistent_buffers, trained_tensors
from lightning_lora.checkpoint.hashes import exact_hashes, sampled
from lightning_lora.model.families import family_of
from lightning_lora.model.names import clean_name, joined
from lightning_lora.model.side_effects import FrozenStatistics
from lightning_lora.model.spread import reshard
from lightning_lora.model.state import injected_roots, named_lora_layers


@dataclass
class _Watch:
    hashes: dict[str, int] = field(default_factory=dict)
    moved: set[str] = field(default_factory=set)


_WATCHES: "WeakKeyDictionary[nn.Module, _Watch]" = WeakKeyDictionary()


def look_for_moved(module: nn.Module) -> None:
    """Compare the frozen tensors of ``module`` with what they were at the first call. Called on all ranks.

    Compared are parameters outside the adapted models, those of a user's own module outside of adapted layers, and
    buffers that a checkpoint leaves out. What has moved once is in all later files: a resume from a file without it
    would use the values that a new process builds.
    """
    watch = _WATCHES.setdefault(module, _Watch())
    now = exact_hashes({name: tensor for name, tensor in _left_out(module).items() if name not in watch.moved})
    watch.moved |= {name for name, value in now.items() if value != watch.hashes.setdefault(name, value)}


def moved_tensors(module: nn.Module) -> set[int]:
    """Return the identities of the tensors that :func:`look_for_moved` found."""
    moved = _moved(module)
    named = [*module.named_parameters(), *module.named_buffers()] if moved else []
    return {id(tensor) for name, tensor in named if clean_name(name) in moved}


def count_as_moved(module: nn.Module, names: Iterable[str]) -> None:
    """Count frozen tensors that a loaded file held as moved, so that later files hold them too."""
    _WATCHES.setdefault(module, _Watch()).moved.update(_left_out(module).keys() & set(names))


def describe_left_out(module: nn.Module) -> dict[str, Any]:
    """Return fingerprints of the frozen parameters that a checkpoint leaves out, and the names of those that moved.

    Called on all ranks.
    """
    moved, frozen = _moved(module), _frozen_parameters(module)
    return {
        **sampled({name: tensor for name, tensor in frozen.items() if name not in moved}),
        "moved": [name for name in frozen if name in moved],
    }


def other_left_out(recorded: Mapping[str, Any], module: nn.Module, rename: Callable[[str], str]) -> str | None:
    """Return the first parameter that a file leaves out and that has other values in ``module``. Called on all ranks.

    Args:
        recorded: what :func:`describe_left_out` returned when the file was written.
        rename: the function from a name in the file to the name in ``module``.
    """
    names = [rename(name) for name in recorded["names"]]
    frozen = _frozen_parameters(module)
    own = sampled({name: frozen[name] for name in names if name in frozen})
    return first_other_name(own, {**recorded, "names": names})


def refusal_of_left_out(name: str, source: Any) -> str:
    """Return the error for a parameter that :func:`other_left_out` found."""
    return (
        f"{name!r} was frozen and never changed in the run that wrote {source}, so that the file does not hold it, and "
        "this module holds other values of it. Build it from the same file or with the same seed as then, or make it a "
        "buffer (register_buffer), which checkpoints hold"
    )


def _moved(module: nn.Module) -> set[str]:
    watch = _WATCHES.get(module)
    return set() if watch is None else watch.moved


def _left_out(module: nn.Module) -> dict[str, Tensor]:
    held = trained_tensors(module)
    buffers = {
        clean_name(joined(path, name)): buffer
        for path, owner in module.named_modules()
        if not isinstance(owner, FrozenStatistics)  # of the base, by which an adapter knows it
        for name, buffer in named_persistent_buffers(owner)
    }
    tensors = {name: tensor for name, tensor in {**_frozen_parameters(module), **buffers}.items() if name not in held}
    return {name: tensor for name, tensor in tensors.items() if not tensor.is_meta and tensor.numel() > 0}


def _frozen_parameters(module: nn.Module) -> dict[str, Tensor]:
    """Return the frozen parameters that are no part of a pretrained base, by clean name.

    Of a user's own module that is adapted as a whole, the base are the adapted layers.
    """
    reshard(module)
    base: set[int] = set()
    for root in injected_roots(module).values():
        is_own = root is module and family_of(root) is None
        parts = named_lora_layers(root).values() if is_own else [root]
        base |= {id(parameter) for part in parts for parameter in part.parameters()}
    named = {clean_name(name): parameter for name, parameter in module.named_parameters()}
    return {name: p for name, p in named.items() if id(p) not in base and not p.requires_grad}
