"""Which modules a config means: PEFT's matching rules, and errors where PEFT is silent.

Names are relative to the adapted model. The rules are those of PEFT 0.21 (``check_target_module_exists``,
``_maybe_include_all_linear_layers``, ``get_pattern_key``); what differs is that a pattern which hits nothing is an
error.
"""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from torch import nn

from lightning_lora.config import LoRAConfig
from lightning_lora.layers import is_linear, mixin_for
from lightning_lora.root import clean_name

V = TypeVar("V")
ALL_LINEAR = "all-linear"


def select_layers(model: nn.Module, config: LoRAConfig, trained_whole: Sequence[str]) -> dict[str, nn.Module]:
    """Return the modules to adapt by name, in ``named_modules`` order.

    Args:
        trained_whole: names of modules that train whole; they and their children are left out.

    Raises:
        ValueError: a pattern hits nothing, or hits a module of a kind that cannot be adapted.
    """
    modules = _named_modules(model)
    for field in ("target_modules", "exclude_modules"):
        _check_hits(field, getattr(config, field), modules, model)
    if is_all_linear(config.target_modules):
        head = _output_head(model)
        candidates = {n: m for n, m in modules.items() if is_linear(m) and m is not head}
    else:
        candidates = {n: m for n, m in modules.items() if _is_target(n, config)}
        _check_indices(config, modules)
    selected = {
        name: module
        for name, module in candidates.items()
        if not _hits(config.exclude_modules, name) and not _is_inside(name, trained_whole)
    }
    if not selected:
        raise ValueError(
            f"target_modules={config.target_modules!r} leaves no layer of {type(model).__name__} to adapt after "
            f"exclude_modules={config.exclude_modules!r} and the modules that train whole, {list(trained_whole)}"
        )
    for name, module in selected.items():
        _check_kind(name, module)
    return selected


def select_trained_whole(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Return the full names of the modules that ``modules_to_save`` means: names that end in an entry."""
    wanted = list(names)
    modules = _named_modules(model)
    for entry in wanted:
        if not any(name.endswith(entry) for name in modules):
            nearest = _nearest([entry], modules)
            raise ValueError(f"modules_to_save entry {entry!r} matches no module of {type(model).__name__}{nearest}")
    found = [name for name in modules if name.endswith(tuple(wanted))]
    return [name for name in found if not any(name.startswith(f"{other}.") for other in found)]


def pattern_value(patterns: Mapping[str, V] | None, name: str, default: V) -> V:
    """Return the value of the first pattern that matches the end of ``name``, else ``default``."""
    for key, value in (patterns or {}).items():
        if _matches_end(key, name):
            return value
    return default


def check_patterns(config: LoRAConfig, names: Iterable[str]) -> None:
    """Raise ``ValueError`` for a rank or alpha pattern that no adapted layer matches."""
    adapted = list(names)
    for field in ("rank_pattern", "alpha_pattern"):
        for key in getattr(config, field):
            if not any(_matches_end(key, name) for name in adapted):
                raise ValueError(f"{field} key {key!r} matches none of the adapted layers{_nearest([key], adapted)}")


def is_all_linear(target_modules: str | Sequence[str]) -> bool:
    """Whether the target is the word for every linear layer."""
    return isinstance(target_modules, str) and target_modules.lower() == ALL_LINEAR


def _named_modules(model: nn.Module) -> dict[str, nn.Module]:
    return {clean_name(name): module for name, module in model.named_modules() if clean_name(name)}


def _matches_end(key: str, name: str) -> bool:
    return re.match(rf"(.*\.)?({key})$", name) is not None


def _hits(patterns: str | Sequence[str] | None, name: str) -> bool:
    if patterns is None:
        return False
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return any(name == pattern or name.endswith(f".{pattern}") for pattern in patterns)


def _is_inside(name: str, modules: Sequence[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def _is_target(name: str, config: LoRAConfig) -> bool:
    if not _hits(config.target_modules, name):
        return False
    wanted = config.layers_to_transform
    if wanted is None or isinstance(config.target_modules, str) or name in config.target_modules or wanted == []:
        return True
    index = _layer_index(name, config.layers_pattern)
    return index is not None and (index == wanted if isinstance(wanted, int) else index in wanted)


def _layer_index(name: str, layers_pattern: str | Sequence[str] | None) -> int | None:
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


def _check_indices(config: LoRAConfig, names: Iterable[str]) -> None:
    """Raise ``ValueError`` for an index in ``layers_to_transform`` that no target lies in."""
    wanted = config.layers_to_transform
    hit = (_layer_index(name, config.layers_pattern) for name in names if _hits(config.target_modules, name))
    there = sorted({index for index in hit if index is not None})
    for index in [wanted] if isinstance(wanted, int) else wanted or []:
        if index not in there:
            lists = f" in layers_pattern={config.layers_pattern!r}" if config.layers_pattern else ""
            raise ValueError(
                f"layers_to_transform entry {index} is the index of no block with {config.target_modules!r}{lists}; "
                f"there are: {', '.join(map(str, there)) or 'none'}"
            )


def _output_head(model: nn.Module) -> nn.Module | None:
    """Return the output embeddings of a model that can name them, as transformers' models do."""
    get_output_embeddings = getattr(model, "get_output_embeddings", None)
    return get_output_embeddings() if callable(get_output_embeddings) else None


def _check_hits(
    field: str, patterns: str | Sequence[str] | None, modules: Mapping[str, nn.Module], model: nn.Module
) -> None:
    if patterns is None or (field == "target_modules" and is_all_linear(patterns)):
        return
    if isinstance(patterns, str):
        try:
            re.compile(patterns)
        except re.error as error:
            raise ValueError(f"{field}={patterns!r} is not a regular expression: {error}") from None
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if not any(_hits(pattern if isinstance(patterns, str) else [pattern], name) for name in modules):
            hint = ""
            if isinstance(patterns, str) and any(_hits([pattern], name) for name in modules):
                hint = f"; a string is a regular expression for the whole name: for a suffix write [{pattern!r}]"
            raise ValueError(
                f"{field} entry {pattern!r} matches no module of "
                f"{type(model).__name__}{hint or _nearest([pattern], modules)}"
            )


def _nearest(patterns: Iterable[str], names: Iterable[str]) -> str:
    """Return "; nearest: ..." with the names, or last parts of names, most like the patterns."""
    pool = {name.rpartition(".")[2] for name in names} | set(names)
    near = [name for pattern in patterns for name in difflib.get_close_matches(pattern, sorted(pool), n=3, cutoff=0.4)]
    return f"; nearest: {', '.join(near)}" if near else f"; there are: {', '.join(sorted(pool, key=len)[:10])}"


def has_redundant_forward(module: nn.Module) -> bool:
    """Whether the instance's ``forward`` is the class's own after all, which accelerate leaves on unhooking."""
    return getattr(module.__dict__.get("forward"), "__func__", None) is type(module).forward


def _check_kind(name: str, module: nn.Module) -> None:
    kind = type(module).__name__
    mixin = mixin_for(module)
    if mixin is None:
        raise ValueError(
            f"{name!r} is a {kind}, which cannot be adapted: linear layers and embeddings can. To train it whole, "
            "name it in modules_to_save; to leave it, narrow target_modules or use exclude_modules. Other kinds: "
            "lightning_lora.layers.register"
        )
    if "forward" in module.__dict__ and not has_redundant_forward(module):
        raise ValueError(
            f"{name!r} has a forward of its own on the instance (accelerate's hooks do this), which would bypass "
            "the adapter; remove it first: accelerate.hooks.remove_hook_from_module(model, recurse=True)"
        )
    try:
        mixin.check(module)
    except ValueError as error:
        raise ValueError(f"{name!r} cannot be adapted: {error}; leave it out with exclude_modules") from None
