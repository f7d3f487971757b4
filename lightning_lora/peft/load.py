"""``load_peft``: a PEFT directory into a model."""

import os
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.checkpoint.file import copy_tensors
from lightning_lora.checkpoint.fingerprint import fingerprint, first_difference, first_other_value, renamed
from lightning_lora.checkpoint.storage import Location, location
from lightning_lora.config import LoRAConfig
from lightning_lora.layers import LoRALayer, mixin_for, with_options
from lightning_lora.layers.convolution import LoRAConv
from lightning_lora.layers.parameters import sizes_of_parameter
from lightning_lora.model.families import Family, family_of
from lightning_lora.model.finite import OnNonfinite, check_finite
from lightning_lora.model.heads import resize_advice
from lightning_lora.model.inject import inject_anew, remove
from lightning_lora.model.matching import is_all_linear, layer_index, pattern_value
from lightning_lora.model.names import clean_name
from lightning_lora.model.state import require_injection
from lightning_lora.model.targets import select_layers, select_parameters
from lightning_lora.peft.diffusers import DIFFUSERS_NAME, read_diffusers
from lightning_lora.peft.directory import (
    CONFIG_NAME,
    Adapter,
    checked_config,
    read_config,
    read_tensors,
    sorted_tensors,
)
from lightning_lora.peft.experts import fuse_experts
from lightning_lora.peft.trained import (
    check_ties,
    check_trained,
    set_copies_apart,
    token_rows,
    trained_modules,
    untrained_values,
)


def load_peft(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    check_base: bool = True,
    component: str | None = None,
    on_nonfinite: OnNonfinite = "error",
) -> nn.Module:
    """Adapt ``model`` as a PEFT directory describes, in place, and load its tensors. Returns the same object.

    The tensors decide which layers are adapted and with what rank; the config must agree with them. Nothing is changed
    unless everything fits. Rows that a resized embedding has beyond those it shares with the model's are copied.

    Args:
        directory: a local one or a URL that fsspec knows, such as ``"s3://bucket/adapter"``.
        component: which model's adapter to take from a directory of diffusers (``pytorch_lora_weights.safetensors``),
            such as ``"unet"`` or ``"text_encoder"``; not needed where it holds one.
        check_base: compare the model with the fingerprint of the base that :func:`save_peft` left in the file.
        on_nonfinite: what to do about an adapter that holds NaN or infinity.

    Raises:
        FileNotFoundError: the directory, its config or its tensors are missing.
        ValueError: the adapter is of another kind, does not fit the model, or holds NaN or infinity, or its files are
            damaged.
    """
    directory = location(directory)
    family = family_of(model)
    skeleton = None if family is None else family.skeleton(model)
    if family is not None and skeleton is not None:
        return _load_by_skeleton(model, family, skeleton, directory, check_base=check_base, on_nonfinite=on_nonfinite)
    if (directory / DIFFUSERS_NAME).is_file() and not (directory / CONFIG_NAME).is_file():
        values, loaded = read_diffusers(directory, component)
        peft_config = checked_config(values, directory / DIFFUSERS_NAME)
        metadata: dict[str, Any] = {}
    else:
        peft_config = read_config(directory)
        loaded, metadata = read_tensors(directory)
    adapter = sorted_tensors(loaded, metadata, directory)
    check_finite(loaded, directory, on_nonfinite)
    modules = {clean_name(name): module for name, module in model.named_modules()}
    set_copies_apart(adapter, peft_config, modules)
    check_ties(model, adapter, peft_config, modules, directory)
    peft_config = fuse_experts(adapter, peft_config, modules, directory)
    tensors = _by_our_names(adapter, peft_config, modules, model, directory)
    tails = check_trained(model, adapter, directory)
    config = _config_for(model, peft_config, adapter, tensors, modules, directory)
    inject_anew(model, config, check_ranks=False)
    untold = untrained_values(model, adapter)
    if untold:
        remove(model)
        raise ValueError(
            f"{directory} brings values of its own for {untold[0]!r} ({len(untold)} tensors), which its config does "
            "not train. Is a file damaged, or from another PEFT?"
        )
    recorded = adapter.metadata.get("base") if check_base else None
    if recorded is not None:
        difference = first_difference(model, {**recorded, "hashes": torch.tensor(recorded["hashes"])})
        _refuse_base(model, directory, recorded, difference)
    copy_tensors(tensors | adapter.trained, model)
    for target, first, rows in tails:
        with torch.no_grad():
            target[first:].copy_(rows)
    return model


def _refuse_base(model: nn.Module, directory: Location, recorded: Mapping[str, Any], difference: str | None) -> None:
    """Give the model back and raise ``ValueError`` where its base is not the recorded one."""
    if difference is None:
        return
    remove(model)
    source = f" ({recorded['source']})" if recorded.get("source") else ""
    raise ValueError(
        f"{directory} was trained on another base model{source}: {difference}. Load that base, or accept this one with "
        "check_base=False"
    )


def _load_by_skeleton(
    model: nn.Module,
    family: Family,
    skeleton: nn.Module,
    directory: Location,
    *,
    check_base: bool,
    on_nonfinite: OnNonfinite,
) -> nn.Module:
    """Read a directory that names other layers than ``model`` does, by way of a skeleton of those."""
    view = load_peft(skeleton, directory, check_base=False, on_nonfinite=on_nonfinite)
    injection = require_injection(view)
    recorded = read_tensors(directory)[1].get("base") if check_base else None
    inject_anew(model, injection.config, check_ranks=False)
    if recorded is not None:
        own = renamed(fingerprint(model), family.peft_name)
        difference = first_other_value(own, {**recorded, "hashes": torch.tensor(recorded["hashes"])})
        _refuse_base(model, directory, recorded, difference)
    _, sources = family.adapted_view(model)
    copy_tensors({source: view.get_parameter(name).detach() for name, (_, source) in sources.items()}, model)
    return model


def _by_our_names(
    adapter: Adapter,
    peft_config: Mapping[str, Any],
    modules: Mapping[str, nn.Module],
    model: nn.Module,
    directory: Location,
) -> dict[str, Tensor]:
    """Return the adapter's tensors under our names and in our layout, after checking their shapes; renames
    ``adapter.factors`` to the names of layers and parameters.
    """
    asked = {"magnitude": bool(peft_config.get("use_dora")), "bias": bool(peft_config.get("lora_bias"))}
    tensors: dict[str, Tensor] = {}
    pairs: dict[str, dict[str, Tensor]] = {}
    for path, pair in adapter.factors.items():
        _check_parts(path, pair, asked, directory)
        parts = path.split(".")
        layer = ".".join(part for part in parts if part != "base_layer")
        name, owner, part = _owner(layer, parts.count("base_layer"), peft_config, modules)
        if part is not None:
            pair = _unstacked(pair, modules[owner], part, layer, directory)
            tensors |= {f"{owner}.lora_{x}_{part}": value for x, value in pair.items()}
        else:
            _check_layer(layer, pair, modules, model, directory)
            _check_more(layer, pair, modules[layer], directory)
            tensors |= {f"{layer}.lora_{x}": value for x, value in pair.items()}
        if name in pairs:  # PEFT saves both where an attention and its out_proj are targets
            raise ValueError(f"{directory} has two adapters for {name!r}, under {path!r} and another name of it")
        pairs[name] = pair
    adapter.factors = pairs
    tensors |= {f"{name}.lora_rows": rows for name, rows in adapter.rows.items()}
    return tensors


def _owner(
    layer: str, depth: int, peft_config: Mapping[str, Any], modules: Mapping[str, nn.Module]
) -> tuple[str, str, str | None]:
    """Return ``(name of the pair, module, parameter)`` for PEFT's path; the parameter is ``None`` for a layer.

    PEFT wraps a module once for every adapted parameter: the module's first parameter is the innermost.
    """
    module = modules.get(layer)
    wanted = peft_config.get("target_parameters") or []
    if module is None or mixin_for(module) is not None:
        return layer, layer, None
    parts = [
        local
        for local in module._parameters
        if any(f"{layer}.{local}" == entry or f"{layer}.{local}".endswith(f".{entry}") for entry in wanted)
    ]
    if depth >= len(parts):
        return layer, layer, None
    part = parts[len(parts) - 1 - depth]
    return f"{layer}.{part}", layer, part


def _unstacked(
    pair: dict[str, Tensor], module: nn.Module, part: str, layer: str, directory: Location
) -> dict[str, Tensor]:
    """Return A ``[E, r, in]`` and B ``[E, out, r]`` from PEFT's expert-major rows and rank-major columns."""
    if set(pair) != {"A", "B"}:
        raise ValueError(f"{directory} adapts {part!r} of {layer!r} with {sorted(pair)}; expected A and B alone")
    experts, in_features, out_features = sizes_of_parameter(module, part)
    A, B = pair["A"], pair["B"]
    if A.ndim != 2 or A.shape[1] != in_features or B.shape[0] != out_features or A.shape[0] % experts:
        raise ValueError(
            f"{directory} adapts {part!r} of {layer!r} with A {tuple(A.shape)} and B {tuple(B.shape)}, the model has "
            f"{experts} x {in_features} -> {out_features}: another base model?"
        )
    if module.get_parameter(part).ndim == 2:
        return pair
    r = A.shape[0] // experts
    return {"A": A.view(experts, r, in_features), "B": B.view(out_features, r, experts).permute(2, 0, 1)}


def _check_layer(
    layer: str, pair: Mapping[str, Tensor], modules: Mapping[str, nn.Module], model: nn.Module, directory: Location
) -> None:
    mixin = mixin_for(modules[layer]) if layer in modules else None
    if mixin is None:
        kind = type(modules[layer]).__name__ if layer in modules else "missing"
        raise ValueError(
            f"{directory} adapts {layer!r}, which is {kind} in {type(model).__name__}: another base model?"
        )
    module: Any = modules[layer]
    if issubclass(mixin, LoRAConv) and (module.padding_mode != "zeros" or set(module.dilation) != {1}):
        raise ValueError(
            f"{directory} adapts {layer!r}, a convolution with dilation={tuple(module.dilation)} and "
            f"padding_mode={module.padding_mode!r}, both of which PEFT leaves out of lora_A: its adapter means another "
            "function here"
        )
    given = (tuple(pair["A"].shape), tuple(pair["B"].shape))
    expected = _shapes(mixin, module, given[0][0])
    if given != expected:
        sizes, theirs = mixin.features(module), _sizes(pair)
        advice = resize_advice(model, f"{layer}.weight", theirs, sizes)
        raise ValueError(
            f"{directory} adapts {layer!r} as {theirs[0]} -> {theirs[1]}, the model has {sizes[0]} -> {sizes[1]}"
            + (advice or ": another base model?")
        )


def _check_parts(path: str, pair: Mapping[str, Tensor], asked: Mapping[str, bool], directory: Location) -> None:
    """Raise ``ValueError`` where a magnitude or a bias lacks that the config tells of, or is there untold."""
    fields = {"magnitude": ("use_dora", "lora_magnitude_vector"), "bias": ("lora_bias", "lora_B.bias")}
    for part, is_asked in asked.items():
        field, key = fields[part]
        if is_asked != (part in pair):
            there = f"no {key}" if is_asked else f"a {key}"
            raise ValueError(
                f"{directory}: its config says {field}={is_asked}, and {path!r} has {there}. Is a file damaged?"
            )


def _check_more(layer: str, pair: Mapping[str, Tensor], module: nn.Module, directory: Location) -> None:
    """Check the shapes of a magnitude or a bias, and that the layer can have one."""
    given = {f"lora_{part}": tuple(value.shape) for part, value in pair.items() if part not in "AB"}
    mixin = mixin_for(module)
    assert mixin is not None
    try:
        mixin = with_options(mixin, module, use_dora="lora_magnitude" in given, lora_bias="lora_bias" in given)
    except ValueError as error:
        raise ValueError(f"{directory} adapts {layer!r} with {', '.join(given)}: {error}") from None
    expected = mixin.more_shapes(module)
    if given != expected:
        raise ValueError(f"{directory} adapts {layer!r} with {given}, the model has {expected}: another base model?")


def _sizes(pair: Mapping[str, Tensor]) -> tuple[int, int]:
    return pair["A"][0].numel(), pair["B"].shape[0]


def _shapes(mixin: type[LoRALayer], module: nn.Module, r: int) -> Any:
    try:
        return mixin.shapes(module, r)
    except ValueError:
        return None


def _config_for(
    model: nn.Module,
    peft_config: Mapping[str, Any],
    adapter: Adapter,
    tensors: Mapping[str, Tensor],
    modules: Mapping[str, nn.Module],
    directory: Location,
) -> LoRAConfig:
    """Return our config for a directory, after checking that it describes the layers that there are tensors for."""
    r = int(peft_config["r"])
    pairs = adapter.factors
    ranks = {
        name: pair["A"].shape[pair["A"].ndim - 2 if f"{name}.lora_A" not in tensors else 0]
        for name, pair in pairs.items()
    }
    other = next((name for name, rank in ranks.items() if rank != r), None)
    if other is not None and not peft_config.get("rank_pattern"):
        raise ValueError(
            f"{directory} has r={r} in its config, and tensors of rank {ranks[other]} for {other!r}. Is a file damaged?"
        )
    rank_pattern: dict[str, int] = _live_patterns(peft_config.get("rank_pattern"), pairs)
    alpha_pattern: dict[str, float] = _live_patterns(peft_config.get("alpha_pattern"), pairs)
    own = _without_projections(pairs, modules)
    if peft_config.get("ensure_weight_tying"):
        alpha_pattern = {**_alphas_of_twins(peft_config, {name: ranks[name] for name in own}), **alpha_pattern}
    # the tensors know the ranks; patterns that PEFT wrote in another order than it applied them do not
    if any(pattern_value(rank_pattern, name, r) != ranks[name] for name in own):
        rank_pattern = {f"^{re.escape(name)}": ranks[name] for name in own if ranks[name] != r}
    whole = trained_modules(peft_config, adapter, modules, directory)
    layers = [name for name in own if f"{name}.lora_A" in tensors]
    parameters = [name for name in own if name not in layers]
    targets = _live(peft_config["target_modules"], modules)
    exclude = _live(peft_config.get("exclude_modules"), modules) or None
    indices, lists = _live_indices(peft_config, modules), peft_config.get("layers_pattern") or None
    if (targets and is_all_linear(targets)) or (
        not parameters and any(_is_weight(t, pairs) for t in _entries(peft_config))
    ):
        targets = layers  # what the word means differs with the library and its version: the tensors say
    if peft_config.get("ensure_weight_tying"):
        targets, exclude, indices, lists = layers, None, None, None  # PEFT adapts tied twins of the targets too
    config = LoRAConfig(
        r=r,
        alpha=float(peft_config["lora_alpha"]),
        dropout=0.0 if parameters else float(peft_config.get("lora_dropout") or 0.0),
        target_modules=targets,
        target_parameters=parameters or None,
        trainable_token_indices=token_rows(peft_config, adapter, model, directory),
        exclude_modules=exclude,
        modules_to_save=whole,
        bias=peft_config.get("bias") or "none",
        use_rslora=bool(peft_config.get("use_rslora")),
        use_dora=bool(peft_config.get("use_dora")),
        lora_bias=bool(peft_config.get("lora_bias")),
        layers_to_transform=indices,
        layers_pattern=lists,
        adapter_dtype="float64" if any(p["A"].dtype == torch.float64 for p in pairs.values()) else "float32",
        rank_pattern=rank_pattern,
        alpha_pattern=alpha_pattern,
    )
    described = set(select_layers(model, config, whole)) if config.target_modules else set()
    if parameters and described != set(layers) | (set(pairs) - set(own)):
        # PEFT takes layers named like parts of fused experts for those; the tensors say which ones it adapted
        config = replace(
            config, target_modules=layers, exclude_modules=None, layers_to_transform=None, layers_pattern=None
        )
        described = set(select_layers(model, config, whole)) if layers else set()
    described |= set(select_parameters(model, config))
    if described != set(pairs):
        without, undescribed = sorted(described - set(pairs)), sorted(set(pairs) - described)
        raise ValueError(
            f"{directory}: config and tensors disagree: no tensors for {without[:3]} ({len(without)} layers), "
            f"tensors that the config does not describe for {undescribed[:3]} ({len(undescribed)} layers). Is a "
            "file damaged, or from another model?"
        )
    return config


def _alphas_of_twins(peft_config: Mapping[str, Any], ranks: Mapping[str, int]) -> dict[str, float]:
    """Return alphas for layers of another rank than the config says.

    A tied twin has the other's tensors, and is scaled by its own rank and alpha of the config all the same.
    """
    alphas: dict[str, float] = {}
    for name, rank in ranks.items():
        r = pattern_value(peft_config.get("rank_pattern"), name, peft_config["r"])
        if r != rank:
            ratio = (rank / r) ** (0.5 if peft_config.get("use_rslora") else 1)
            alpha = pattern_value(peft_config.get("alpha_pattern"), name, peft_config["lora_alpha"])
            alphas[f"^{re.escape(name)}"] = alpha * ratio
    return alphas


def _entries(peft_config: Mapping[str, Any]) -> list[str]:
    return list(peft_config.get("target_parameters") or [])


def _is_weight(entry: str, pairs: Mapping[str, Any]) -> bool:
    """Whether an entry of ``target_parameters`` names the weight of an adapted layer."""
    layer, _, local = entry.rpartition(".")
    return local == "weight" and any(name == layer or name.endswith(f".{layer}") for name in pairs)


def _without_projections(pairs: Mapping[str, Any], modules: Mapping[str, nn.Module]) -> list[str]:
    """Return the names that patterns and targets speak of: an attention's output projection goes with it."""
    return [
        name
        for name in pairs
        if not (
            name.rpartition(".")[0] in pairs and isinstance(modules.get(name.rpartition(".")[0]), nn.MultiheadAttention)
        )
    ]


def _live_indices(peft_config: Mapping[str, Any], modules: Mapping[str, nn.Module]) -> Any:
    """Return ``layers_to_transform`` without indices of blocks that the model does not have; PEFT ignores those."""
    indices = peft_config.get("layers_to_transform")
    if not isinstance(indices, list):
        return indices
    there = {layer_index(name, peft_config.get("layers_pattern")) for name in modules}
    return [index for index in indices if index in there]


def _live_patterns(patterns: Any, names: Mapping[str, Any]) -> dict[str, Any]:
    """Return the patterns that match an adapted layer; PEFT ignores the others."""
    return {
        key: value
        for key, value in (patterns or {}).items()
        if any(re.match(rf"(.*\.)?({key})$", name) for name in names)
    }


def _live(targets: Any, modules: Mapping[str, nn.Module]) -> Any:
    """Return the entries of a list that name something; PEFT's lists may name more than the model has."""
    if targets is None or isinstance(targets, str):
        return targets
    return sorted(t for t in targets if any(name == t or name.endswith(f".{t}") for name in modules))
