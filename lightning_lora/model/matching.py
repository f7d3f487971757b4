"""PEFT's rules of what a pattern hits, and errors where PEFT is silent: a pattern that hits nothing is one.

Names are relative to the adapted model. The rules are those of PEFT 0.21 (``check_target_module_exists``,
``get_pattern_key``).
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TypeVar

from lightning_lora.config import LoRAConfig, brief
from lightning_lora.model.names import nearest_names

V = TypeVar("V")
ALL_LINEAR = "all-linear"


def is_all_linear(target_modules: str | Sequence[str]) -> bool:
    """Whether the target is the word for every linear layer."""
    return isinstance(target_modules, str) and target_modules.lower() == ALL_LINEAR


def hits(patterns: str | Sequence[str] | None, name: str) -> bool:
    """Whether a pattern of a list is ``name`` or a dotted suffix of it, or a regular expression matches all of it."""
    if patterns is None:
        return False
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return any(name == pattern or name.endswith(f".{pattern}") for pattern in patterns)


def is_target(name: str, config: LoRAConfig) -> bool:
    """Whether ``target_modules`` and ``layers_to_transform`` mean the module of that name."""
    if not hits(config.target_modules, name):
        return False
    wanted = config.layers_to_transform
    if wanted is None or isinstance(config.target_modules, str) or name in config.target_modules or wanted == []:
        return True
    index = layer_index(name, config.layers_pattern)
    return index is not None and (index == wanted if isinstance(wanted, int) else index in wanted)


def layer_index(name: str, layers_pattern: str | Sequence[str] | None) -> int | None:
    """Return the index of the block that ``name`` lies in: the first number in the name, or that of a named list."""
    if not layers_pattern:
        expressions = [r".*?\.[^.]*\.(\d+)\."]
    else:
        patterns = [layers_pattern] if isinstance(layers_pattern, str) else layers_pattern
        expressions = [rf"(?:^|.*?\.){pattern}\.(\d+)\." for pattern in patterns]
    for expression in expressions:
        match = re.match(expression, name)
        if match is not None:
            return int(match[1])
    return None


def pattern_value(patterns: Mapping[str, V] | None, name: str | Sequence[str], default: V) -> V:
    """Return the value of the first pattern that matches the end of ``name``, or of one of several; or ``default``."""
    for key, value in (patterns or {}).items():
        if any(_matches_end(key, one) for one in ([name] if isinstance(name, str) else name)):
            return value
    return default


def check_patterns(config: LoRAConfig, names: Iterable[str]) -> None:
    """Raise ``ValueError`` for a rank or alpha pattern that no adapted layer matches."""
    adapted = list(names)
    for field in ("rank_pattern", "alpha_pattern"):
        for key in getattr(config, field):
            if not any(_matches_end(key, name) for name in adapted):
                near = nearest_names([key], adapted)
                raise ValueError(f"{field} key {key!r} matches none of the adapted layers{near}")


def _matches_end(key: str, name: str) -> bool:
    return re.match(rf"(.*\.)?({key})$", name) is not None


def check_indices(config: LoRAConfig, names: Iterable[str]) -> None:
    """Raise ``ValueError`` for an index in ``layers_to_transform`` that no target lies in."""
    wanted = config.layers_to_transform
    if wanted is None:
        return
    hit = (layer_index(name, config.layers_pattern) for name in names if hits(config.target_modules, name))
    there = sorted({index for index in hit if index is not None})
    for index in [wanted] if isinstance(wanted, int) else wanted:
        if index not in there:
            lists = f" in layers_pattern={config.layers_pattern!r}" if config.layers_pattern else ""
            raise ValueError(
                f"layers_to_transform entry {index} is the index of no block with {brief(config.target_modules)}{lists}"
                f"; there are: {', '.join(map(str, there)) or 'none'}"
            )


def check_hits(field: str, patterns: str | Sequence[str] | None, names: Collection[str], model_name: str) -> None:
    """Raise ``ValueError`` for a pattern that hits none of the names of modules."""
    if patterns is None or (field == "target_modules" and is_all_linear(patterns)):
        return
    if isinstance(patterns, str):
        try:
            re.compile(patterns)
        except re.error as error:
            raise ValueError(f"{field}={patterns!r} is not a regular expression: {error}") from None
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if not any(hits(pattern if isinstance(patterns, str) else [pattern], name) for name in names):
            hint = ""
            if isinstance(patterns, str) and any(hits([pattern], name) for name in names):
                hint = f"; a string is a regular expression for the whole name: for a suffix write [{pattern!r}]"
            raise ValueError(
                f"{field} entry {pattern!r} matches no module of {model_name}{hint or nearest_names([pattern], names)}"
            )
