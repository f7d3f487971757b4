"""Read the weights that a base was quantised or rounded from, one tensor at a time, from safetensors."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

from torch import Tensor, nn

from lightning_lora.layers.plain_weight import stored_names
from lightning_lora.model.base_files import Fused, names_in_model, open_slices
from lightning_lora.model.names import clean_name, joined, listed, named_modules


class OriginalBase:
    """Weights in safetensors by the names that they have in a model; each is read when it is asked for."""

    def __init__(self, root: nn.Module, slices: Mapping[str, Any], source: str) -> None:
        self.root, self.source = root, source
        self.slices = slices
        targets: dict[str, Any] = {clean_name(name): p for name, p in root.named_parameters(remove_duplicate=False)}
        modules = named_modules(root)
        targets |= {joined(path, name): None for path, module in modules.items() for name in stored_names(module)}
        plain, fused = names_in_model(root, slices, targets)
        self.keys = {name: key for key, name in plain.items() if name in targets}
        self.fused: dict[str, Fused] = {one.name: one for one in fused}

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise ``ValueError`` where the files lack a tensor of these names, or hold one of another shape."""
        lacking = [name for name in shapes if name not in self.keys and name not in self.fused]
        if lacking:
            raise ValueError(
                f"base: {self.source} lacks {listed(lacking, 3)}: give the weights that the base was made from"
            )
        for name, shape in shapes.items():
            found = tuple(self.slices[self.keys[name]].get_shape()) if name in self.keys else shape
            if found != shape:
                raise ValueError(
                    f"base: {self.source} has {list(found)} for {name!r}, the model has {list(shape)}: give the "
                    "weights that the base was made from, as plain numbers"
                )

    def read(self, name: str) -> Tensor:
        """Return the tensor that has this name in the model."""
        if name in self.keys:
            return self.slices[self.keys[name]][:]  # type: ignore[no-any-return]
        return deepcopy(self.fused[name]).tensors(self.root, self.slices)[name]  # a converter collects what it reads


@contextmanager
def open_original(root: nn.Module, base: str | os.PathLike[str]) -> Iterator[OriginalBase | None]:
    """Open the safetensors, a file or a directory, that hold the weights of ``root``; ``"trained"`` gives ``None``."""
    if base == "trained":
        yield None
        return
    with open_slices(os.fspath(base)) as slices:
        yield OriginalBase(root, slices, os.fspath(base))
