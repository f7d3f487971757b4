"""Find in a PEFT directory what the table in ``readers`` speaks of."""

import math
import re
import reprlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from lightning_lora.model.state import first_nonfinite
from lightning_lora.peft.config import CHANGES_BASE, alpha_of, rank_of, scaling_of
from lightning_lora.peft.directory import Files, sorted_tensors
from lightning_lora.peft.keys import PREFIX, Key

# the field of the config that asks for each kind of tensors that are no factors
_FIELDS = {
    "magnitude": "use_dora",
    "rows": "trainable_token_indices",
    "bias": "lora_bias",
    "base bias": "bias",
    "whole": "modules_to_save",
}
_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # the values of --max-lora-rank (vllm/config/lora.py)
_PARTNERS = {"q_proj": "v_proj", "v_proj": "q_proj", "k_proj": "q_proj", "up_proj": "gate_proj"}
MERGE = "Use merge(model, remove=True) and serve the merged model."


class Layer(NamedTuple):
    """An adapted layer as PEFT means it; ``is_fused``: parameters of experts, whose tensors hold r rows per expert."""

    name: str
    rank: int
    alpha: float
    scaling: float
    num_dims: int
    is_fused: bool


@dataclass(frozen=True)
class Evidence:
    """What a directory holds.

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
        yield from (
            f"{n}={reprlib.repr(self.config[n])}" for n in names if self.config.get(n) and self.config[n] != "none"
        )

    def lacks(self, *names: str) -> Iterator[str]:
        """Yield the fields of these names that the config does not have, if any."""
        missing = [name for name in names if name not in self.config]
        yield from [f"adapter_config.json lacks {', '.join(missing)}"] if missing else []

    def beside(self, *kinds: str, where: str = "") -> Iterator[str]:
        """Yield for each kind of tensors that is there the field that asks for it, and the tensors."""
        for kind in kinds:
            names = [name for name in self.tensors.get(kind, ()) if re.search(where, name)]
            if names:
                yield " with ".join([*self._asking(kind), several(names, "tensor")])

    def asked(self, *kinds: str) -> Iterator[str]:
        """Yield the same, and of the kinds that have no tensors the field that asks for them."""
        for kind in kinds:
            yield from self.beside(kind) if self.tensors.get(kind) else self._asking(kind)

    def adapted(self, where: Callable[[Layer], object]) -> Iterator[str]:
        """Yield the layers of a kind, if any."""
        names = [layer.name for layer in self.layers if where(layer)]
        yield from [several(names, "layer")] if names else []

    def convolutions(self) -> Iterator[str]:
        """Yield the layers whose factors are no matrices."""
        dims = next((layer.num_dims for layer in self.layers if layer.num_dims != 2), 2)
        found = self.adapted(lambda layer: layer.num_dims != 2)
        yield from (f"{layers} has factors of {dims} dimensions" for layers in found)

    def of_other_rank(self) -> Iterator[str]:
        """Yield the layers whose rank is not r."""
        ranks = [layer.rank for layer in self.layers if not layer.is_fused and layer.rank != self.r]
        found = self.adapted(lambda layer: not layer.is_fused and layer.rank != self.r)
        yield from (f"{layers} has rank {ranks[0]} and r={self.r}" for layers in found)

    def without_partner(self) -> Iterator[str]:
        """Yield the layers that are adapted without the one that SGLang stacks them with."""
        names = [layer.name for layer in self.layers if not layer.is_fused]
        for last, partner in _PARTNERS.items():
            ends = [name for name in names if re.search(rf"layers\.\d+\..*\b{last}$", name)]
            alone = [name for name in ends if name.removesuffix(last) + partner not in names]
            yield from [f"{several(alone, 'layer')} is adapted without its {partner}"] if alone else []

    def changed_base(self) -> Iterator[str]:
        """Yield an initialisation that changes the base weights in training."""
        if str(self.config.get("init_lora_weights")).lower().startswith(CHANGES_BASE):
            yield from self.fields("init_lora_weights")

    def expression(self) -> Iterator[str]:
        """Yield ``target_modules`` where it is an expression."""
        targets = self.config.get("target_modules", [])
        if not isinstance(targets, list) and targets not in ("all", "all-linear"):
            yield f"target_modules={targets!r}"

    def above_max_rank(self, reader: str) -> Iterator[str]:
        """Yield what a server does about a rank above its largest; SGLang looks at r alone."""
        default, rank = (16, max([self.r, *(x.rank for x in self.layers)])) if reader == "vLLM" else (self.r, self.r)
        limit = default if self.max_rank is None else self.max_rank
        if rank > limit:
            values = [n for n in _VLLM_RANKS if n >= rank] if reader == "vLLM" else [rank]
            option = f"Start it with --max-lora-rank {values[0]}." if values else MERGE
            error = "ValueError" if self.r > limit else "RuntimeError when it copies the tensors"
            yield f"rank {rank} is above max_lora_rank={limit}: {reader} rejects the adapter with a {error}. {option}"

    def misread(self, reader: str, served: Callable[[Layer], float | None]) -> Iterator[str]:
        """Yield the layers whose scale is not ``served``, the reader's (``None``: it does not read the layer).

        Fields that change nothing, or that the reader knows, go unnamed.
        """
        scales = [(layer, scale) for layer in self.layers if (scale := served(layer)) is not None]
        wrong = [(layer, scale) for layer, scale in scales if not math.isclose(layer.scaling, scale, rel_tol=1e-6)]
        if not wrong:
            return
        layers, first, scale = [layer for layer, _ in wrong], *wrong[0]
        is_rslora = bool(self.config.get("use_rslora"))
        ignored = {
            "use_rslora": reader != "vLLM" and is_rslora and any(layer.rank != 1 for layer in layers),
            "rank_pattern": reader == "vLLM" and any(layer.rank != self.r for layer in layers),
            "alpha_pattern": any(layer.alpha != self.alpha for layer in layers),
        }
        fields = " and ".join(field for field, is_ignored in ignored.items() if is_ignored)
        yield (
            f"{fields or f'lora_alpha={self.alpha:g}'}: PEFT scales {several([x.name for x in layers], 'layer')} by "
            f"{first.scaling:.4g} (lora_alpha={first.alpha:g}, r={first.rank}, use_rslora={is_rslora}), {reader} "
            f"silently by {scale:.4g}."
        )

    def _asking(self, kind: str) -> list[str]:
        return [*self.fields(_FIELDS[kind])] if kind in _FIELDS else []


def gather(files: Files, source: Any, max_rank: int | None) -> Evidence:
    """Return the evidence of a directory with a LoRA adapter; a damaged file is a ``ValueError``."""
    config = files.config
    given = {name: config.get(name, 8) for name in ("r", "lora_alpha")}  # PEFT's own defaults
    if not isinstance(given["r"], int) or given["r"] < 1 or not isinstance(given["lora_alpha"], (int, float)):
        raise ValueError(f"{source}/adapter_config.json has {given}; expected an integer above 0 and a number")
    adapter = sorted_tensors(files, source)
    tensors: dict[str, list[str]] = {}
    for key, what in sorted(adapter.keys.items()):
        if what.kind not in ("A", "B") or what.plain != key:
            tensors.setdefault(_kind(key, what, config), []).append(key.removeprefix(PREFIX))
    names = sorted(adapter.factors, key=lambda name: f"{name}.lora_A")
    layers = [layer for name in names for layer in _layers(config, name, tuple(adapter.factors[name]["A"].shape))]
    alpha = float(given["lora_alpha"])
    return Evidence(config, given["r"], alpha, layers, tensors, first_nonfinite(files.tensors), max_rank)


def _kind(key: str, what: Key, config: dict[str, Any]) -> str:
    name = key.removeprefix(PREFIX)
    if what.kind in ("A", "B"):
        return "renamed"
    if any(f".{module}." in f".{name}" for module in config.get("modules_to_save") or ()):
        return "whole"
    if what.kind == "trained":
        return "base bias" if name.endswith(".bias") else "whole"
    return what.kind


def _layers(config: dict[str, Any], name: str, shape: tuple[int, ...]) -> Iterator[Layer]:
    module = name.removesuffix(".base_layer")
    is_fused = module != name or module.endswith(".experts")
    parameters = [p.rpartition(".")[2] for p in config.get("target_parameters") or ()] if is_fused else []
    for full in [f"{module}.{parameter}" for parameter in parameters] or [module]:
        # the tensors know the rank; of a fused pair they know only its product with the number of experts
        rank = rank_of(config, full) if is_fused else shape[0]
        yield Layer(name, rank, alpha_of(config, full), scaling_of(config, full, rank), len(shape), is_fused)


def several(names: Sequence[str], noun: str) -> str:
    """Return the first name and how many more there are."""
    names = list(dict.fromkeys(names))  # a fused pair stands for several parameters
    more = f" and {len(names) - 1} more {noun}{'s' * (len(names) > 2)}" if len(names) > 1 else ""
    return f"{noun} {names[0]!r}{more}"
