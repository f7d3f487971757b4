"""Find the repeated blocks of a model, and checkpoint or compile each of them in place."""

import functools
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from typing_extensions import override

from lightning_lora.compat.transformers import block_classes
from lightning_lora.layers.class_swap import SwappedModule, swap_class
from lightning_lora.model.names import clean_name, nearest_names


def find_blocks(root: nn.Module, shard_modules: Sequence[str] | None = None) -> dict[str, nn.Module]:
    """Return the outermost repeated blocks of ``root`` by name.

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


def _outermost(modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
    kept: dict[str, nn.Module] = {}
    for name, module in modules.items():
        parents = name.split(".")
        if not any(".".join(parents[:depth]) in kept for depth in range(1, len(parents))):
            kept[name] = module
    return kept


class Block(SwappedModule):
    """Mixin for a block that recomputes its activations in backward, or runs compiled, or both.

    Attributes:
        lora_checkpoint: keep only the block's inputs for backward.
        lora_backend: ``torch.compile`` the block's forward with this backend; equal blocks share the compiled code.
    """

    class_prefix: ClassVar[str] = ""
    base_attribute: ClassVar[str] = "block_base_class"  # the block may be a module whose class was swapped before

    block_base_class: ClassVar[type[nn.Module]]
    lora_checkpoint: bool
    lora_backend: str | None

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        run = self.block_base_class.forward if self.lora_backend is None else _compiled(*self._code())
        if not self.lora_checkpoint or not torch.is_grad_enabled():
            return run(self, *args, **kwargs)
        # a key-value cache would be filled a second time by the recomputation
        kwargs = {name: _without_cache(name, value) for name, value in kwargs.items()}
        return checkpoint(functools.partial(run, self), *args, use_reentrant=False, **kwargs)

    def _code(self) -> tuple[Any, str]:
        assert self.lora_backend is not None
        return self.block_base_class.forward, self.lora_backend


def wrap_blocks(blocks: Sequence[nn.Module], *, activation_checkpointing: bool, backend: str | None) -> None:
    """Make blocks recompute their activations or run compiled, in place. Names and parameters stay as they are."""
    if not activation_checkpointing and backend is None:
        return
    for block in blocks:
        if not isinstance(block, Block):
            swap_class(block, Block)
        block.__dict__.update(lora_checkpoint=activation_checkpointing, lora_backend=backend)


_CACHES = ("past_key_value", "past_key_values", "layer_past", "cache_params", "past_key_value_states")


def _without_cache(name: str, value: Any) -> Any:
    if name in _CACHES:
        return None
    return False if name == "use_cache" else value


@functools.cache
def _compiled(forward: Any, backend: str) -> Any:
    return torch.compile(forward, backend=backend)
