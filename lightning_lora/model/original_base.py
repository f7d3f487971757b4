"""Read the weights that a base was quantised or rounded from, one tensor at a time, from safetensors."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lightning_lora.layers.plain_weight import stored_names
from lightning_lora.layers.quantized import QuantizedModule
from lightning_lora.model.base_files import Fused, names_in_model, open_slices
from lightning_lora.model.names import clean_name, joined, listed, named_modules
from lightning_lora.ops.quantized import stored_as
from lightning_lora.ops.sample_hash import dtype_name, sample_hash
from lightning_lora.ops.sharded import is_sharded


class OriginalBase:
    """Weights in safetensors by the names that they have in a model; each is read when it is asked for."""

    def __init__(self, root: nn.Module, slices: Mapping[str, Any], source: str) -> None:
        self.root, self.source = root, source
        self.slices = slices
        targets: dict[str, Any] = {clean_name(name): p for name, p in root.named_parameters(remove_duplicate=False)}
        self.modules = modules = named_modules(root)
        targets |= {joined(path, name): None for path, module in modules.items() for name in stored_names(module)}
        plain, fused = names_in_model(root, slices, targets)
        self.keys = {name: key for key, name in plain.items() if name in targets}
        self.fused: dict[str, Fused] = {one.name: one for one in fused}

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise ``ValueError`` where the files lack a tensor of these names, or hold other values or another shape."""
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
        other = [name for name in shapes if self._is_other(name)]
        if other:
            raise ValueError(
                f"base: {self.source} holds other weights than those that the base was made from: {listed(other, 3)} "
                "differ by more than their precision. Give the original of this base"
            )

    def _is_other(self, name: str) -> bool:
        """Whether a tensor is known not to be what the model's was made from, by the hash that a fingerprint has."""
        known = self._origin(name)
        if known is None:
            return False
        value, dtype = known
        tensor = self.read(name)
        rounds_twice = "float16" in (dtype, dtype_name(tensor)) and dtype != dtype_name(tensor)
        return not rounds_twice and int(sample_hash(tensor, tensor)) != value

    def _origin(self, name: str) -> tuple[int, str] | None:
        """Return hash and dtype of what the model's tensor was made from; ``None`` where nobody saw it."""
        path, _, local = name.rpartition(".")
        module = self.modules[path]
        if isinstance(module, QuantizedModule) and local in module.quantized:
            origin = module.origins.get(local)
            return None if origin is None else (origin.value, origin.dtype)
        parameter = module._parameters.get(local)
        if parameter is None or parameter.requires_grad or parameter.is_meta:
            return None
        if is_sharded(parameter) or stored_as(parameter) is not None:
            return None
        return int(sample_hash(parameter, parameter)), dtype_name(parameter)

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
    if not Path(base).exists():
        raise FileNotFoundError(
            f"no safetensors at {os.fspath(base)}: base is 'trained', or the path of the original weights, a "
            "safetensors file or a directory"
        )
    with open_slices(os.fspath(base)) as slices:
        yield OriginalBase(root, slices, os.fspath(base))
