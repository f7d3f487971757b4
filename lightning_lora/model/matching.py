"""Which modules a config means: PEFT's matching rules, and errors where PEFT is silent.

Names are relative to the adapted model. The rules are those of PEFT 0.21 (``check_target_module_exists``,
``_maybe_include_all_linear_layers``, ``get_pattern_key``); what differs is that a pattern which hits nothing is an
error.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from torch import nn

from lightning_lora.config import LoRAConfig, brief
from lightning_lora.layers import is_linear, mixin_for
from lightning_lora.layers.parameters import sizes_of_parameter
from lightning_lora.megatron.layers import is_parallel_linear
from lightning_lora.megatron.names import megatron_parts
from lightning_lora.model.names import clean_name, nearest_names
from lightning_lora.model.root import is_megatron, is_pretrained
from lightning_lora.ops.quantized import check_plain

V = TypeVar("V")
_MAMBA_TYPES = ("mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h")  # whose out_proj PEFT refuses to adapt
ALL_LINEAR = "all-linear"


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


def select_layers(model: nn.Module, config: LoRAConfig, trained_whole: Sequence[str]) -> dict[str, nn.Module]:
    """Return the modules to adapt by name, in ``named_modules`` order.

    A layer of Megatron-core comes once for each of its parts, under the Hugging Face name of the part; a pattern may
    name either.

    Args:
        trained_whole: names of modules that train whole; they and their children are left out.

    Raises:
        ValueError: a pattern hits nothing, or hits a module of a kind that cannot be adapted.
    """
    modules = _named_modules(model)
    parts = {part.name: part for found in megatron_parts(model, fused=config.fused_pairs).values() for part in found}
    layers = {part.layer for part in parts.values()}
    known = modules | {name: modules[part.layer] for name, part in parts.items()}
    if config.fused_pairs:
        _check_fused(config, known, model)
    for field in ("target_modules", "exclude_modules"):
        _check_hits(field, getattr(config, field), known, model)

    def names(name: str) -> tuple[str, ...]:
        return (name, parts[name].layer) if name in parts else (name,)

    # a layer by its parts, in its place
    units = {name: module for name, module in known.items() if name not in layers or name in parts}
    if is_all_linear(config.target_modules):
        linear = all_linear(model)
        candidates = {name: module for name, module in units.items() if any(n in linear for n in names(name))}
    elif not config.target_modules:
        return {}
    else:
        candidates = {n: m for n, m in units.items() if any(_is_target(name, config) for name in names(n))}
        _check_indices(config, known)
        # the output projection of an attention is read by it, and adapted with it, as in PEFT
        attentions = [name for name, module in candidates.items() if isinstance(module, nn.MultiheadAttention)]
        projections = {f"{name}.out_proj" for name in attentions}
        candidates = {name: module for name, module in units.items() if name in candidates or name in projections}
    selected = {
        name: module
        for name, module in candidates.items()
        if not any(_hits(config.exclude_modules, n) for n in names(name))
        and not _is_inside(names(name)[-1], trained_whole)
    }
    engine = [type(m).__name__ for m in modules.values() if type(m).__module__.endswith(".transformer_engine")]
    if not selected and is_megatron(model) and engine:
        raise ValueError(
            f"the layers of {type(model).__name__} are Transformer Engine's ({engine[0]}), which communicate inside "
            "and have no local product for an adapter: build it with gpt_model(path), or with Megatron-core's local "
            "layer spec, in which norms and attention may be Transformer Engine's"
        )
    if not selected:
        raise ValueError(
            f"target_modules={brief(config.target_modules)} leaves no layer of {type(model).__name__} to adapt after "
            f"exclude_modules={brief(config.exclude_modules)} and the modules that train whole, "
            f"{brief(list(trained_whole))}"
        )
    for name, module in selected.items():
        if is_parallel_linear(module) and name not in parts:
            raise ValueError(
                f"{name!r} is the output head of a Megatron-core model, which is not adapted: leave it out of "
                f"target_modules, or train it whole with modules_to_save=[{name!r}]"
            )
        _check_kind(name, module)
    return selected


def all_linear(model: nn.Module) -> dict[str, nn.Module]:
    """Return what ``"all-linear"`` means: every linear layer but the output head and what PEFT refuses to adapt.

    In a model of several modalities it means the language model; see :func:`left_out_towers`.
    """
    modules = _named_modules(model)
    head = _output_head(model)
    inert = ("out_proj",) if getattr(getattr(model, "config", None), "model_type", None) in _MAMBA_TYPES else ()
    towers = left_out_towers(model)
    return {
        name: module
        for name, module in modules.items()
        if is_linear(module)
        and module is not head
        and name.rpartition(".")[2] not in inert
        and not _is_inside(name, list(towers))
    }


def left_out_towers(model: nn.Module) -> dict[str, int]:
    """Return the parts beside the language model of a multimodal one, each with its number of linear layers.

    These are vision and audio towers and projectors. A model has them when its config describes a text model and
    another one (transformers' ``sub_configs``) and it holds a ``language_model``, or a ``text_model`` that it generates
    with; CLIP's, beside which there is no output head, is one of two equals. In models that generate and do not name
    their language model (BLIP, GIT, Idefics, Phi-4 multimodal, Moshi's speech codec) they are known by their own names.
    """
    config = getattr(model, "config", None)
    modules = _named_modules(model)
    names = ("language_model", "thinker", *(["text_model"] if _output_head(model) is not None else []))
    language = [name for name in modules if name.rpartition(".")[2] in names]
    if not is_pretrained(model) or "text_config" not in getattr(config, "sub_configs", {}) or not language:
        can_generate = is_pretrained(model) and model.can_generate()  # type: ignore[operator]  # a PreTrainedModel
        towers = [name for name in modules if name.rpartition(".")[2] in _TOWER_NAMES] if can_generate else []
        outer = [name for name in towers if not _is_inside(name.rpartition(".")[0], towers)]
        return {name: sum(is_linear(m) for m in modules[name].modules()) for name in outer}
    outermost = min(language, key=len)
    parent = outermost.rpartition(".")[0]
    siblings = [
        name
        for name in modules
        if name.rpartition(".")[0] == parent and name != outermost and modules[name] is not _output_head(model)
    ]
    counts = {n: sum(is_linear(m) for m in modules[n].modules()) for n in siblings}
    return {name: count for name, count in counts.items() if count}


def select_parameters(model: nn.Module, config: LoRAConfig) -> dict[str, list[str]]:
    """Return the parameters that ``target_parameters`` means: names of a module's own parameters, by the module's name.

    Raises:
        ValueError: an entry names no parameter, or one that is neither a matrix nor a stack of matrices.
    """
    wanted = config.target_parameters or []
    found: dict[str, list[str]] = {}
    hit: set[str] = set()
    for module_name, module in {"": model, **_named_modules(model)}.items():
        for local in module._parameters:
            name = f"{module_name}.{local}" if module_name else local
            entries = [entry for entry in wanted if name == entry or name.endswith(f".{entry}")]
            if entries and not _hits(config.exclude_modules, module_name):
                sizes_of_parameter(module, local)
                found.setdefault(module_name, []).append(local)
            hit.update(entries)
    for entry in wanted:
        if entry not in hit:
            names = [clean_name(name) for name, _ in model.named_parameters()]
            is_module = any(name == entry or name.endswith(f".{entry}") for name, _ in model.named_modules())
            hint = ": it is a module, for target_modules" if is_module else nearest_names([entry], names)
            raise ValueError(f"target_parameters entry {entry!r} matches no parameter of {type(model).__name__}{hint}")
    return found


def select_token_rows(model: nn.Module, config: LoRAConfig) -> dict[str, tuple[nn.Module, list[nn.Module], list[int]]]:
    """Return the tables with rows that train: ``{name: (embedding or output head, modules tied to it, token ids)}``.

    Raises:
        ValueError: no table is meant, one is meant twice, or a module of another kind is tied to it.
    """
    wanted = config.trainable_token_indices
    if wanted is None:
        return {}
    modules = _named_modules(model)
    if not isinstance(wanted, Mapping):
        wanted = {_input_embedding(model, modules): wanted}
    selected: dict[str, tuple[nn.Module, list[nn.Module], list[int]]] = {}
    for entry, token_ids in wanted.items():
        names = [n for n, m in modules.items() if (n == entry or n.endswith(f".{entry}")) and _is_table(m)]
        if len(names) != 1:
            raise ValueError(
                f"trainable_token_indices: {entry!r} names {len(names)} embeddings or output heads of "
                f"{type(model).__name__}, expected one{nearest_names([entry], modules)}"
            )
        weight = modules[names[0]]._parameters.get("weight")
        check_plain(f"trainable_token_indices: the weight of {names[0]!r}", weight)
        tied = {n: m for n, m in modules.items() if m._parameters.get("weight") is weight}
        if not all(_is_table(module) for module in tied.values()):
            raise ValueError(
                f"trainable_token_indices: the weight of {names[0]!r} is tied to more than embeddings and linear heads"
            )
        first, *_ = tied  # a checkpoint has the rows under this name
        _, _, rows = selected.setdefault(first, (tied.pop(first), list(tied.values()), list(token_ids)))
        if rows != list(token_ids):
            raise ValueError(
                f"trainable_token_indices lists other rows for {entry!r} than for {first!r}, which is the same tensor"
            )
    return selected


def _is_table(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding) or type(module) is nn.Linear


def _input_embedding(model: nn.Module, modules: Mapping[str, nn.Module]) -> str:
    get_input_embeddings = getattr(model, "get_input_embeddings", None)
    embedding = get_input_embeddings() if callable(get_input_embeddings) else None
    for name, module in modules.items():
        if module is embedding:
            return name
    return "embed_tokens"


def select_trained_whole(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Return the full names of the modules that ``modules_to_save`` means.

    These are the module of that very name, or else all whose names end in the entry.
    """
    modules = _named_modules(model)
    found: set[str] = set()
    for entry in names:
        hits = {entry} if entry in modules else {name for name in modules if name.endswith(entry)}
        if not hits:
            nearest = nearest_names([entry], modules)
            raise ValueError(f"modules_to_save entry {entry!r} matches no module of {type(model).__name__}{nearest}")
        found |= hits
    ordered = [name for name in modules if name in found]
    for name in ordered:
        for local, parameter in modules[name].named_parameters():
            check_plain(f"modules_to_save: {name}.{local}", parameter)
    return [name for name in ordered if not any(name.startswith(f"{other}.") for other in ordered)]


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


def _check_fused(config: LoRAConfig, known: Iterable[str], model: nn.Module) -> None:
    """Raise ``ValueError`` for a target that is a part of a layer which has one pair for all of its parts."""
    parts = {part.name: part.layer for found in megatron_parts(model).values() for part in found}
    if isinstance(config.target_modules, str):
        return
    for pattern in config.target_modules:
        hit = [name for name in parts if _hits([pattern], name)]
        if hit and not any(_hits([pattern], name) for name in known):
            layer = parts[hit[0]].rpartition(".")[2]
            raise ValueError(
                f"{pattern!r} is a part of {layer!r}, which fused_pairs=True adapts as one: name {layer!r}"
            )


def _check_indices(config: LoRAConfig, names: Iterable[str]) -> None:
    """Raise ``ValueError`` for an index in ``layers_to_transform`` that no target lies in."""
    wanted = config.layers_to_transform
    if wanted is None:
        return
    hit = (layer_index(name, config.layers_pattern) for name in names if _hits(config.target_modules, name))
    there = sorted({index for index in hit if index is not None})
    for index in [wanted] if isinstance(wanted, int) else wanted:
        if index not in there:
            lists = f" in layers_pattern={config.layers_pattern!r}" if config.layers_pattern else ""
            raise ValueError(
                f"layers_to_transform entry {index} is the index of no block with {brief(config.target_modules)}{lists}"
                f"; there are: {', '.join(map(str, there)) or 'none'}"
            )


def _output_head(model: nn.Module) -> nn.Module | None:
    """Return the output embeddings of a model that can name them, as transformers' models do, or Megatron-core's."""
    if is_megatron(model):
        return getattr(model, "output_layer", None)
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
                f"{type(model).__name__}{hint or nearest_names([pattern], modules)}"
            )


def has_redundant_forward(module: nn.Module) -> bool:
    """Whether the instance's ``forward`` is the class's own after all, which accelerate leaves on unhooking."""
    return getattr(module.__dict__.get("forward"), "__func__", None) is type(module).forward


def _check_kind(name: str, module: nn.Module) -> None:
    kind = type(module).__name__
    mixin = mixin_for(module)
    if mixin is None:
        raise ValueError(
            f"{name!r} is a {kind}, which cannot be adapted: linear layers, embeddings, convolutions and attentions "
            "can. To train it whole, name it in modules_to_save; to leave it, narrow target_modules or use "
            "exclude_modules. Other kinds: lightning_lora.layers.register"
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
