"""Named adapters that a file and a model do not share: reading the file adds them, or drops them."""

from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

from lightning.fabric.utilities.rank_zero import rank_zero_info
from torch import nn

from lightning_lora.checkpoint.reading import adapters_by_path, name_of, only_key, section_of
from lightning_lora.model.names import is_inside, joined, listed, without_adapter
from lightning_lora.model.state import injected_roots, require_injection

Places = frozenset[tuple[str, str]]  # the paths of models and the names of adapters in them


class Changed(NamedTuple):
    """The adapters that the model alone has, and those that the file alone has.

    Attributes:
        added: they keep the values that they have, and an optimizer has taken no step with them.
        dropped: their tensors in the file are left unread.
    """

    added: Places = frozenset()
    dropped: Places = frozenset()

    def adds(self, tensor: str) -> bool:
        """Whether a tensor of the model, by its clean name, is of an adapter that the file lacks."""
        return is_of(tensor, self.added)

    def drops(self, tensor: str) -> bool:
        """Whether a tensor of the file, by the name that it would have in the model, is of one that the model lacks."""
        return is_of(tensor, self.dropped)

    def below(self, key: str) -> "Changed":
        """Return the same for tensors whose names stand behind a module's key in a state of Fabric."""
        return Changed(*(frozenset((joined(key, path), name) for path, name in places) for places in self))

    def say(self, source: Any) -> None:
        """Log which adapters are added and dropped, if any, in one line."""
        added, dropped = (listed(sorted({repr(name) for _, name in places})) for places in self)
        words = [f"{added} only in the model, kept as it is there"] if added else []
        words += [f"{dropped} only in the file, left out"] if dropped else []
        if words:
            rank_zero_info(f"{source} holds other adapters than the model: {'; '.join(words)}")


UNCHANGED = Changed()


def joined_changes(changes: Iterable[Changed]) -> Changed:
    """Return the changes of several modules as one."""
    added, dropped = zip(*changes, strict=True)
    return Changed(frozenset().union(*added), frozenset().union(*dropped))


def is_of(tensor: str, places: Places) -> bool:
    """Whether a tensor is of one of these adapters."""
    name = without_adapter(tensor)[1] if places else ""
    return bool(name) and any(name == other and is_inside(tensor, path) for path, other in places)


def changed_adapters(
    checkpoint: Mapping[str, Any], module: nn.Module, source: Any, state_key: str | None = None
) -> Changed:
    """Return which named adapters a checkpoint and a module do not share.

    Args:
        state_key: of the module's tensors in the checkpoint; ``None`` takes the only one.

    Raises:
        ValueError: they share none, or one of them has its adapter without a name.
    """
    section, roots = section_of(checkpoint, source), injected_roots(module)
    state_key = only_key(section, source) if state_key is None else state_key
    by_path = adapters_by_path(section, roots, state_key, source)
    return compared_names({path: [*map(name_of, entries)] for path, entries in by_path.items()}, roots, source)


def compared_names(theirs: Mapping[str, Collection[str]], roots: Mapping[str, nn.Module], source: Any) -> Changed:
    """Return which adapters ``theirs`` and the models do not share; both are by the path of the model.

    Raises:
        ValueError: as :func:`changed_adapters`.
    """
    added: set[tuple[str, str]] = set()
    dropped: set[tuple[str, str]] = set()
    for path, root in roots.items():
        ours, given = require_injection(root).plans.keys(), set(theirs[path])
        if not ours & given:
            raise ValueError(
                f"{source} holds {_words(given)}, and {type(root).__name__} has {_words(ours)}. {_remedy(given)}"
            )
        added |= {(path, name) for name in ours - given if name}
        dropped |= {(path, name) for name in given - ours if name}
    return Changed(frozenset(added), frozenset(dropped))


def _words(names: Collection[str]) -> str:
    return "an adapter without a name" if "" in names else f"adapters named {listed(sorted(map(repr, names)))}"


def _remedy(given: Collection[str]) -> str:
    if "" in given:
        return "convert() the file, and load_peft(model, directory, adapter=name) that"
    return "Adapt the model with add_adapter(model, name, config), by the names in the file"
