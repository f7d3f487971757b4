"""What ``target_modules`` means: PEFT's rules of what a pattern hits, and ``"all-linear"``.

A pattern that hits nothing is an error, where PEFT is silent. Names are relative to the adapted model. The rules are
those of PEFT 0.21 (``check_target_module_exists``, ``get_pattern_key``).
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TypeVar

from torch import nn

from lightning_lora.config import LoRAConfig, brief
from lightning_lora.layers import is_linear
from lightning_lora.model.families import is_pretrained, output_head
from lightning_lora.model.names import is_inside_any, joined, named_modules, nearest_names, outermost

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


_MAMBA_TYPES = ("mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h")  # whose out_proj PEFT refuses to adapt


# beside the language model, in transformers models that do not name it
_TOWER_NAMES = (
    "vision_model",
    "image_encoder",
    "visual_projection",
    "perceiver_resampler",
    "embed_tokens_extend",
    "codec_model",
    "protein_encoder",
)


def all_linear(model: nn.Module) -> dict[str, nn.Module]:
    """Return what ``"all-linear"`` means: every linear layer but the output head and what PEFT refuses to adapt.

    In a model of several modalities it means the language model; see :func:`left_out_towers`.
    """
    head, towers = output_head(model), list(left_out_towers(model))
    inert = ("out_proj",) if getattr(getattr(model, "config", None), "model_type", None) in _MAMBA_TYPES else ()
    return {
        name: module
        for name, module in named_modules(model).items()
        if is_linear(module)
        and module is not head
        and name.rpartition(".")[2] not in inert
        and not is_inside_any(name, towers)
    }


def left_out_towers(model: nn.Module) -> dict[str, int]:
    """Return the parts beside the language model of a multimodal one, each with its number of linear layers.

    These are vision and audio towers and projectors. A model has them when its config describes a text model and
    another one (transformers' ``sub_configs``) and it holds a ``language_model``, or a ``text_model`` that it generates
    with; CLIP's, beside which there is no output head, is one of two equals. In models that generate and do not name
    their language model (BLIP, GIT, Idefics, Phi-4 multimodal, Moshi's speech codec) they are known by their own names.
    """
    config, modules = getattr(model, "config", None), named_modules(model)
    names = ("language_model", "thinker", *(["text_model"] if output_head(model) is not None else []))
    language = [name for name in modules if name.rpartition(".")[2] in names]
    if not is_pretrained(model) or "text_config" not in getattr(config, "sub_configs", {}) or not language:
        can_generate = is_pretrained(model) and model.can_generate()  # type: ignore[operator]  # a PreTrainedModel
        towers = [name for name in modules if name.rpartition(".")[2] in _TOWER_NAMES] if can_generate else []
        return {name: _num_linear(modules[name]) for name in outermost(towers)}
    parent, _, last = min(language, key=len).rpartition(".")
    siblings = {joined(parent, n): m for n, m in modules[parent].named_children() if n != last}
    counts = {name: _num_linear(module) for name, module in siblings.items() if module is not output_head(model)}
    return {name: count for name, count in counts.items() if count}


def _num_linear(module: nn.Module) -> int:
    return sum(is_linear(part) for part in module.modules())
