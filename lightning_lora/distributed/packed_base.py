"""Fill the packed weights of a model from a checkpoint, which holds floating-point values or packed bytes of each."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_lora.checkpoint.hashes import summed
from lightning_lora.distributed.packed_target import PackedTarget, fill_from_packed, fill_from_values
from lightning_lora.layers.quantized import Origin
from lightning_lora.layers.quantized_state import scales_name
from lightning_lora.model.names import listed
from lightning_lora.ops.sample_hash import sample_hash
from lightning_lora.ops.sharded import collective_device, local_part


class PackedBase:
    """The packed weights of a model, and the files that fill them.

    Attributes:
        targets: the weights by name.
        weights: keys of the files that are weights, and not what belongs to a packed one.
    """

    def __init__(self, targets: Mapping[str, PackedTarget], slices: Mapping[str, Any]) -> None:
        self.targets = targets
        self._slices = slices
        owners = {key: owner for key in slices if (owner := _owner_of(key, slices)) is not None}
        self.weights = [key for key in slices if key not in owners]
        self._companions: dict[str, list[str]] = {}
        for key, owner in owners.items():
            self._companions.setdefault(owner, []).append(key)
        self._is_finite: dict[str, bool] = {}
        self._origins: dict[str, Tensor] = {}  # addends to the hashes of values that were quantised

    def fill(self, key: str, name: str) -> None:
        """Fill the weight called ``name`` with what the files hold under ``key``."""
        source, companions = self._slices[key], self._companions.get(key, ())
        if not companions and source[:1].is_floating_point():
            self.quantize(source, source.get_shape(), name)
            return
        entries = {_renamed(companion, key, name): self._slices[companion] for companion in companions}
        self._is_finite[name] = fill_from_packed(self.targets[name], {name: source, **entries}, name)
        self.targets[name].module.origins.pop(self.targets[name].name, None)

    def quantize(self, source: Any, given: Collection[int], name: str) -> None:
        """Fill the weight called ``name`` with floating-point values: a tensor, or a slice of a file."""
        target = self.targets[name]
        shape, expected = tuple(given), tuple(target.shape)
        if shape != expected:
            raise ValueError(f"base_weights has {shape} for {name!r}, the model has {expected}")
        source = _Transposed(source) if target.module.packs_transpose else source
        self._is_finite[name], self._origins[name] = fill_from_values(target, source)

    def check_floats(self, key: str, name: str) -> None:
        """Raise ``ValueError`` for packed values on disk of a weight that the model does not hold in that form."""
        if key in self._companions:
            raise ValueError(
                f"base_weights has {name!r} in 4 or 8 bits ({listed(self._companions[key], 3)}), and the model holds "
                "it otherwise: quantise the model in the form of the file, or give the 16-bit base"
            )

    def finish(self) -> None:
        """Note the hashes of the values that were quantised, by which a base is known. Called on all ranks.

        Raises:
            ValueError: one of the ranks has read NaN or infinity.
        """
        if not self._is_finite:
            return
        bad = torch.tensor([not finite for finite in self._is_finite.values()], dtype=torch.uint8)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            bad = bad.to(collective_device(bad))
            torch.distributed.all_reduce(bad, torch.distributed.ReduceOp.MAX)
        names = [name for name, is_bad in zip(self._is_finite, bad.tolist(), strict=True) if is_bad]
        if names:
            raise ValueError(
                f"base_weights has NaN or infinity in {listed(names, 3)}, which cannot be quantised: give a base "
                "without them"
            )
        targets = [self.targets[name] for name in self._origins]
        likes = [target.parts["codes"] for target in targets]
        codes = [local_part(like).view(target.form.code_dtype) for target, like in zip(targets, likes, strict=True)]
        addends = [sample_hash(part, like) for part, like in zip(codes, likes, strict=True)]
        hashes = summed([*self._origins.values(), *addends], likes * 2).tolist()
        for target, value, code in zip(targets, hashes[: len(targets)], hashes[len(targets) :], strict=True):
            dtype = str(target.empty.dtype).removeprefix("torch.")
            target.module.origins[target.name] = Origin(value, dtype, code)


@dataclass(frozen=True)
class _Transposed:
    """What returns slices of rows and columns of the transpose of a source."""

    source: Any

    def __getitem__(self, where: slice | tuple[slice, slice]) -> Tensor:
        rows, columns = where if isinstance(where, tuple) else (where, slice(None))
        values: Tensor = self.source[columns, rows]
        return values.t()


def _owner_of(key: str, keys: Collection[str]) -> str | None:
    """Return the key of the packed weight that ``key`` belongs to, in bitsandbytes' names; ``None`` for a weight."""
    module, _, last = key.rpartition(".")
    if last in ("SCB", "weight_format") and f"{module}.weight" in keys:
        return f"{module}.weight"
    parts = key.split(".")
    return next((name for end in range(1, len(parts)) if (name := ".".join(parts[:end])) in keys), None)


def _renamed(companion: str, key: str, name: str) -> str:
    """Return the name of what belongs to the packed weight ``key`` when that is called ``name``."""
    if companion == scales_name(key):
        return scales_name(name)
    return f"{name}_format" if companion.endswith("weight_format") else name + companion.removeprefix(key)
