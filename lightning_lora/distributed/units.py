"""Decide what FSDP2 shards and gathers together: each block, large modules outside of them, and the rest."""

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from lightning.pytorch import LightningModule
from torch import nn

from lightning_lora.compat.transformers import block_classes
from lightning_lora.layers.read_weight import is_read_by
from lightning_lora.model.families import is_pretrained
from lightning_lora.model.names import clean_name, nearest_names
from lightning_lora.model.state import named_adapter_parameters, named_trained_whole


@dataclass
class Units:
    """Which modules of a root are sharded together. The root itself gathers what is in none of them.

    Attributes:
        blocks: each of them a unit, in the order of the model.
        outside: units outside the blocks, children before their parents.
        kept_whole: parameters that every rank holds whole.
    """

    blocks: list[nn.Module]
    outside: list[list[nn.Module]]
    kept_whole: set[nn.Parameter]

    @property
    def members(self) -> list[list[nn.Module]]:
        """The modules of each unit."""
        return [[block] for block in self.blocks] + self.outside


def find_units(
    root: nn.Module, names: Sequence[str] | None, min_numel: int, *, shard_trained: bool, shared: set[nn.Parameter]
) -> Units:
    """Return what is sharded together in ``root``; changes nothing.

    Args:
        names: of the blocks, by class or by name; ``None`` are those of :func:`find_blocks`.
        min_numel: smaller tensors outside the blocks stay whole.
        shard_trained: shard adapters, and all else that trains, like the base.
        shared: parameters that modules outside of ``root`` hold too; they stay whole.

    Raises:
        ValueError: an entry of ``names`` names nothing, or a mere container.
    """
    blocks = find_blocks(root, names)
    inside = {p for block in blocks for p in block.parameters()}
    kept_whole = set() if shard_trained else _trained(root)
    outside = _units_outside(root, inside, min_numel, kept_whole)
    units = Units(blocks, outside, kept_whole)
    rest = set(root.parameters()) - inside - {p for unit in outside for part in unit for p in part.parameters()}
    # the loop may call parts of a LightningModule, and not its forward
    kept_whole |= {p for p in rest if p.numel() < min_numel or isinstance(root, LightningModule)}
    kept_whole |= shared | _tied_across_units(root, units.members)
    kept_whole |= {p for p in root.parameters() if p.ndim == 0}  # FSDP2 refuses scalars
    kept_whole |= _of_other_dtypes(root, units.members, kept_whole)
    outside.sort(key=lambda unit: max(sum(1 for _ in part.modules()) for part in unit))
    return units


def find_blocks(root: nn.Module, shard_modules: Sequence[str] | None) -> list[nn.Module]:
    """Return the outermost repeated blocks of ``root``.

    They are the modules that ``shard_modules`` names by class or by the end of their name, or else what transformers
    lists as ``_no_split_modules``, or else the members of every ``nn.ModuleList`` or ``nn.Sequential`` that holds two
    or more of one class.

    Raises:
        ValueError: an entry of ``shard_modules`` names nothing, or a mere container.
    """
    modules = {clean_name(name): module for name, module in root.named_modules() if name}
    if shard_modules is not None:
        chosen: dict[str, nn.Module] = {}
        for entry in shard_modules:
            hits = {name: module for name, module in modules.items() if _is_named(entry, name, module)}
            if not hits:
                near = nearest_names([entry], [*modules, *(type(module).__name__ for module in modules.values())])
                raise ValueError(f"shard_modules entry {entry!r} names no module of {type(root).__name__}{near}")
            for name, module in hits.items():
                if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
                    members = sorted({type(member).__name__ for member in module.children()})
                    raise ValueError(
                        f"shard_modules entry {entry!r} names {name!r}, a {type(module).__name__}, which has no "
                        f"forward to gather weights for; name its members: {members}"
                    )
            chosen |= hits
        return _outermost({name: module for name, module in modules.items() if name in chosen})
    listed = {class_name for module in (root, *modules.values()) for class_name in block_classes(module)}
    found = {n: m for n, m in modules.items() if any(cls.__name__ in listed for cls in type(m).__mro__)}
    # transformers lists embeddings too, which are no blocks
    found = {n: m for n, m in found.items() if sum(type(o) is type(m) for o in found.values()) > 1}
    return _outermost(found or dict(_repeated(modules)))


def _is_named(entry: str, name: str, module: nn.Module) -> bool:
    return name == entry or name.endswith(f".{entry}") or any(cls.__name__ == entry for cls in type(module).__mro__)


def _repeated(modules: dict[str, nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """Yield the members of lists that hold two or more of one class with parameters of its own or below."""
    for name, module in modules.items():
        if isinstance(module, (nn.ModuleList, nn.Sequential)):
            members = {f"{name}.{index}": child for index, child in module.named_children()}
            counts = Counter(type(child) for child in members.values())
            for path, child in members.items():
                is_container = isinstance(child, (nn.ModuleList, nn.ModuleDict))
                if counts[type(child)] > 1 and not is_container and any(True for _ in child.parameters()):
                    yield path, child


def _outermost(modules: dict[str, nn.Module]) -> list[nn.Module]:
    kept: dict[str, nn.Module] = {}
    for name, module in modules.items():
        parents = name.split(".")
        if not any(".".join(parents[:depth]) in kept for depth in range(1, len(parents))):
            kept[name] = module
    return list(kept.values())


def _trained(root: nn.Module) -> set[nn.Parameter]:
    """Return the adapters' tensors, those that never train too, and whatever else trains."""
    trained = {parameter for parameter in root.parameters() if parameter.requires_grad}
    trained |= {parameter for _, parameter in named_adapter_parameters(root)}
    trained |= set(named_trained_whole(root).values())
    for layer in root.modules():
        trained |= {layer._parameters[name] for name in getattr(layer, "frozen_names", ())}  # type: ignore[misc]
    return trained


def _units_outside(
    root: nn.Module, inside: set[nn.Parameter], min_numel: int, kept_whole: set[nn.Parameter]
) -> list[list[nn.Module]]:
    """Return the modules with large tensors outside the blocks, those that share a tensor together.

    They are sharded by themselves where the loop may call parts of the root: in transformers' models and
    LightningModules. Elsewhere the root's own forward gathers them, which may read a weight without calling its module.
    """
    if not is_pretrained(root) and not isinstance(root, LightningModule):
        return []
    parents = {child: (parent, name) for parent in root.modules() for name, child in parent.named_children()}
    tables = set(_token_tables(root))
    owners: dict[nn.Parameter, list[nn.Module]] = {}
    for module in root.modules():
        for parameter in module._parameters.values():
            if parameter is None or parameter in inside or parameter in kept_whole or parameter.numel() < min_numel:
                continue
            reader, (parent, name) = module, parents.get(module, (None, ""))
            if isinstance(parent, nn.MultiheadAttention) or (parent is not None and is_read_by(parent, name)):
                reader = parent
            while isinstance(module, nn.Embedding) and module not in tables and is_pretrained(root):
                reader, _ = parents[reader]  # such as a table of relative positions
                if type(reader).forward is not nn.Module.forward:
                    break
            if reader is not root:
                owners.setdefault(parameter, []).append(reader)
    units: list[list[nn.Module]] = []
    for readers in owners.values():
        tied = [unit for unit in units if any(reader in unit for reader in readers)]
        merged = list(dict.fromkeys([module for unit in tied for module in unit] + readers))
        units = [unit for unit in units if unit not in tied] + [merged]
    return units


def _token_tables(root: nn.Module) -> Iterator[nn.Module]:
    """Yield the embeddings of tokens, which transformers' models call and never read."""
    for part in root.modules():
        if is_pretrained(part):
            with contextlib.suppress(NotImplementedError):  # a model of sounds or images
                yield part.get_input_embeddings()  # type: ignore[operator]


def _tied_across_units(root: nn.Module, units: Sequence[Sequence[nn.Module]]) -> set[nn.Parameter]:
    """Return the parameters that belong to modules of more than one unit: no unit can gather them for another."""
    seen: set[nn.Module] = set()
    holders: Counter[nn.Parameter] = Counter()
    for unit in [*units, [root]]:
        modules = {module for part in unit for module in part.modules()} - seen
        seen |= modules
        holders.update({p for module in modules for p in module._parameters.values() if p is not None})
    return {parameter for parameter, number in holders.items() if number > 1}


def _of_other_dtypes(
    root: nn.Module, units: Sequence[Sequence[nn.Module]], kept_whole: set[nn.Parameter]
) -> set[nn.Parameter]:
    """Return what trains in another dtype than most that trains in its unit: FSDP2 reduces one dtype per unit."""
    found: set[nn.Parameter] = set()
    groups = [{p for part in unit for p in part.parameters()} for unit in units]
    for group in [*groups, set(root.parameters()).difference(*groups)]:
        trained = [p for p in group if p.requires_grad and p not in kept_whole]
        sizes: Counter[torch.dtype] = Counter()
        for parameter in trained:
            sizes[parameter.dtype] += parameter.numel()
        found |= {p for p in trained if sizes[p.dtype] < max(sizes.values())}
    return found
