"""Find in a PEFT directory what the table in ``readers`` speaks of."""

import math
import re
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from lightning_lora.model.state import first_nonfinite
from lightning_lora.peft.config import CHANGES_BASE, alpha_of, rank_of, scaling_of
from lightning_lora.peft.directory import Files, sorted_tensors
from lightning_lora.peft.layout import PREFIX

MERGE = "Use merge(model, remove=True) and serve the merged model."
# the field of the config that asks for each kind of tensors that are no factors
_FIELDS = {
    "magnitude": "use_dora",
    "rows": "trainable_token_indices",
    "bias": "lora_bias",
    "base bias": "bias",
    "whole": "modules_to_save",
}


class Layer(NamedTuple):
    """An adapted layer as PEFT means it; ``is_fused``: parameters of experts, whose tensors hold r rows per expert."""

    name: str
    rank: int
    alpha: float
    scaling: float
    num_dims: int
    is_fused: bool


class Evidence(NamedTuple):
    """What a directory holds. Its methods yield the subjects of sentences.

    Attributes:
        layers: the adapted layers; one for each parameter that a pair of fused experts can stand for.
        tensors: the names of the tensors that are no plain factors, by kind: those of ``_FIELDS``, ``"base"`` (a copy),
            ``"variant"`` (of another method) and ``"renamed"`` (a factor with the adapter's name in its key).
        nonfinite: the first tensor that holds NaN or infinity.
        max_rank: the largest rank that the server takes; ``None`` for its default.
    """

    config: dict[str, Any]
    r: int
    alpha: float
    layers: list[Layer]
    tensors: dict[str, list[str]]
    nonfinite: str | None
    max_rank: int | None

    def fields(self, *names: str) -> Iterator[str]:
        """Yield the fields of these names that are set, with their values."""
        given = {name: self.config.get(name) for name in names}
        yield from (f"{name}={reprlib.repr(value)}" for name, value in given.items() if value and value != "none")

    def lacks(self, *names: str) -> Iterator[str]:
        """Yield the fields of these names that the config does not have, if any."""
        missing = [name for name in names if name not in self.config]
        yield from [f"adapter_config.json lacks {', '.join(missing)}"] if missing else []

    def beside(self, *kinds: str, where: str = "", or_asked: bool = False) -> Iterator[str]:
        """Yield for each kind of tensors that is there the field that asks for it, and the tensors.

        Args:
            or_asked: yield the field alone too, where there are no such tensors.
        """
        for kind in kinds:
            asking = [*self.fields(_FIELDS.get(kind, ""))]
            names = [name for name in self.tensors.get(kind, ()) if re.search(where, name)]
            if names:
                yield " with ".join([*asking, _several(names, "tensor")])
            elif or_asked:
                yield from asking

    def adapted(self, where: Callable[[Layer], object], what: str = "") -> Iterator[str]:
        """Yield the layers of a kind, if any, and ``what`` filled in for the first."""
        found = [layer for layer in self.layers if where(layer)]
        yield from [_several([layer.name for layer in found], "layer") + what.format(found[0])] if found else []

    def without_partner(self, stacked: Mapping[str, str]) -> Iterator[str]:
        """Yield the layers of blocks that are adapted without the one that they are stacked with."""
        names = [layer.name for layer in self.layers]
        for last, partner in stacked.items():
            ends = [name for name in names if re.search(rf"layers\.\d+\..*\b{last}$", name)]
            alone = [name for name in ends if name.removesuffix(last) + partner not in names]
            yield from [f"{_several(alone, 'layer')} is adapted without its {partner}"] if alone else []

    def changed_base(self) -> Iterator[str]:
        """Yield an initialisation that changes the base weights in training."""
        if str(self.config.get("init_lora_weights")).lower().startswith(CHANGES_BASE):
            yield from self.fields("init_lora_weights")

    def above_max_rank(self, rank: int, default: int, values: Sequence[int], reader: str) -> Iterator[str]:
        """Yield what a server whose option takes ``values`` does about a rank above its largest."""
        limit = default if self.max_rank is None else self.max_rank
        if rank > limit:
            error = "ValueError" if self.r > limit else "RuntimeError when it copies the tensors"
            enough = [value for value in values if value >= rank]
            option = f"Start it with --max-lora-rank {enough[0]}." if enough else MERGE
            yield f"rank {rank} is above max_lora_rank={limit}: {reader} rejects the adapter with a {error}. {option}"

    def misread(self, reader: str, ignored: Sequence[str], served: Callable[[Layer], float | None]) -> Iterator[str]:
        """Yield the layers whose scale is not ``served``, the reader's (``None``: it does not read the layer).

        Args:
            ignored: the fields that the reader does not know. Those that change nothing go unnamed.
        """
        scales = [(layer, scale) for layer in self.layers if (scale := served(layer)) is not None]
        wrong = [(layer, scale) for layer, scale in scales if not math.isclose(layer.scaling, scale, rel_tol=1e-6)]
        if not wrong:
            return
        layers, first, scale = [layer for layer, _ in wrong], *wrong[0]
        is_rslora = bool(self.config.get("use_rslora"))
        matters = {
            "use_rslora": is_rslora and any(layer.rank != 1 for layer in layers),
            "rank_pattern": any(layer.rank != self.r for layer in layers),
            "alpha_pattern": any(layer.alpha != self.alpha for layer in layers),
        }
        fields = " and ".join(field for field in ignored if matters[field]) or f"lora_alpha={self.alpha:g}"
        yield (
            f"{fields}: PEFT scales {_several([layer.name for layer in layers], 'layer')} by {first.scaling:.4g} "
            f"(lora_alpha={first.alpha:g}, r={first.rank}, use_rslora={is_rslora}), {reader} silently by {scale:.4g}."
        )


def gather(files: Files, source: Any, max_rank: int | None) -> Evidence:
    """Return the evidence of a directory with a LoRA adapter; a damaged file is a ``ValueError``."""
    config = files.config
    given = {name: config.get(name, 8) for name in ("r", "lora_alpha")}  # PEFT's own defaults
    if not isinstance(given["r"], int) or given["r"] < 1 or not isinstance(given["lora_alpha"], (int, float)):
        raise ValueError(f"{source}/adapter_config.json has {given}; expected an integer above 0 and a number")
    adapter = sorted_tensors(files, source)
    tensors: dict[str, list[str]] = {}
    for key, what in sorted(adapter.keys.items()):
        name, kind = key.removeprefix(PREFIX), what.kind
        if kind in ("A", "B"):
            kind = "factor" if what.plain == key else "renamed"
        elif any(f".{module}." in f".{name}" for module in config.get("modules_to_save") or ()):
            kind = "whole"
        elif kind == "trained":
            kind = "base bias" if name.endswith(".bias") else "whole"
        tensors.setdefault(kind, []).append(name)
    names = sorted(adapter.factors, key=lambda name: f"{name}.lora_A")
    layers = [layer for name in names for layer in _layers(config, name, tuple(adapter.factors[name]["A"].shape))]
    return Evidence(
        config, given["r"], float(given["lora_alpha"]), layers, tensors, first_nonfinite(files.tensors), max_rank
    )


def _layers(config: dict[str, Any], name: str, shape: tuple[int, ...]) -> Iterator[Layer]:
    module = name.removesuffix(".base_layer")
    is_fused = module != name or module.endswith(".experts")
    parameters = [p.rpartition(".")[2] for p in config.get("target_parameters") or ()] if is_fused else []
    for full in [f"{module}.{parameter}" for parameter in parameters] or [module]:
        # the tensors know the rank; of a fused pair they know only its product with the number of experts
        rank = rank_of(config, full) if is_fused else shape[0]
        yield Layer(name, rank, alpha_of(config, full), scaling_of(config, full, rank), len(shape), is_fused)


def _several(names: Sequence[str], noun: str) -> str:
    """Return the first name and how many more there are."""
    names = list(dict.fromkeys(names))  # a fused pair stands for several parameters
    more = f" and {len(names) - 1} more {noun}{'s' * (len(names) > 2)}" if len(names) > 1 else ""
    return f"{noun} {names[0]!r}{more}"
