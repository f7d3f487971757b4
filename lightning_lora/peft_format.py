"""PEFT directories, out and in: ``adapter_config.json`` and ``adapter_model.safetensors`` as PEFT 0.21 has them."""

import json
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from lightning_lora.checkpoint import copy_tensors
from lightning_lora.config import LoRAConfig
from lightning_lora.files import write_atomically
from lightning_lora.inject import (
    check_not_disabled,
    inject_anew,
    injection_of,
    named_lora_layers,
    named_trained_whole,
    require_root,
)
from lightning_lora.layers import mixin_for
from lightning_lora.layers.embedding import LoRAEmbedding
from lightning_lora.layers.linear import LoRAConv1D
from lightning_lora.matching import pattern_value, select_layers
from lightning_lora.root import clean_name, name_or_path

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
LEGACY_WEIGHTS_NAME = "adapter_model.bin"
PREFIX = "base_model.model."

_TASK_TYPES = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
}
# fields of PEFT's config that change what the adapter computes and are not read here
_UNSUPPORTED = (
    "use_dora",
    "lora_bias",
    "target_parameters",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "layer_replication",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "megatron_config",
    "velora_config",
    "kasa_config",
    "monteclora_config",
)
_RELATIVE_TO_BASE = (True, False, "gaussian", "orthogonal", "eva")
_ADAPTER_KEY = re.compile(r"(?P<layer>.+)\.lora_(?P<kind>embedding_)?(?P<factor>[AB])(\.[^.]+)??(?P<weight>\.weight)?")


def save_peft(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Write the adapter as a directory that PEFT reads. Never writes base weights, never asks the network.

    Rank and alpha that differ from most layers' are written as anchored patterns of full names, so that no order of
    patterns can change their meaning. A tied tensor that trains is written under each of its modules.
    """
    root = require_root(model)
    check_not_disabled(root)
    tensors = {name: value.detach().to("cpu").contiguous() for name, value in _peft_tensors(root).items()}
    config = json.dumps(_peft_config(root), indent=2, sort_keys=True) + "\n"
    directory = Path(directory)
    write_atomically(directory / WEIGHTS_NAME, safetensors.torch.save(tensors, {"format": "pt"}))
    write_atomically(directory / CONFIG_NAME, config.encode())


def load_peft(model: nn.Module, directory: str | os.PathLike[str]) -> nn.Module:
    """Adapt ``model`` as a PEFT directory describes, in place, and load its tensors. Returns the same object.

    The tensors decide which layers are adapted and with what rank; the config must agree with them. Nothing is changed
    unless everything fits.

    Raises:
        FileNotFoundError: the directory, its config or its tensors are missing.
        ValueError: the adapter is of another kind, does not fit the model, or its files are damaged.
    """
    directory = Path(directory)
    peft_config = _read_config(directory)
    adapter = _sort_tensors(_read_tensors(directory), directory)
    config = _config_for(model, peft_config, adapter, directory)
    inject_anew(model, config, check_ranks=False)
    copy_tensors(adapter.by_our_names(), model)
    return model


@dataclass
class _Adapter:
    """The tensors of a directory: factors by layer, and base tensors that trained, by name."""

    factors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    trained: dict[str, Tensor] = field(default_factory=dict)
    base: dict[str, Tensor] = field(default_factory=dict)

    def by_our_names(self) -> dict[str, Tensor]:
        factors = {f"{layer}.lora_{x}": value for layer, pair in self.factors.items() for x, value in pair.items()}
        return factors | self.trained


def _peft_tensors(root: nn.Module) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    layers = named_lora_layers(root)
    for name, layer in layers.items():
        kind, suffix = ("embedding_", "") if isinstance(layer, LoRAEmbedding) else ("", ".weight")
        tensors[f"{PREFIX}{name}.lora_{kind}A{suffix}"] = layer.lora_A
        tensors[f"{PREFIX}{name}.lora_{kind}B{suffix}"] = layer.lora_B
    whole = {id(parameter) for parameter in named_trained_whole(root).values()}
    modules = _modules_trained_whole(root)
    for name, tensor in [*root.named_parameters(remove_duplicate=False), *root.named_buffers(remove_duplicate=False)]:
        clean = clean_name(name)
        owner = clean.rpartition(".")[0]
        if any(owner == module or owner.startswith(f"{module}.") for module in modules):
            tensors[PREFIX + clean] = tensor.clone() if id(tensor) in whole else tensor
        elif id(tensor) in whole:
            tensors[f"{PREFIX}{owner}.base_layer.bias" if owner in layers else PREFIX + clean] = tensor
    return tensors


def _modules_trained_whole(root: nn.Module) -> list[str]:
    """Return the modules that train whole, with those that hold a tied twin of one of their tensors."""
    injection = injection_of(root)
    assert injection is not None
    modules = list(injection.trained_whole)
    inside = {
        id(p)
        for name, p in root.named_parameters(remove_duplicate=False)
        if any(clean_name(name).startswith(f"{module}.") for module in modules)
    }
    for name, parameter in root.named_parameters(remove_duplicate=False):
        owner = clean_name(name).rpartition(".")[0]
        if id(parameter) in inside and not any(owner == m or owner.startswith(f"{m}.") for m in modules):
            modules.append(owner)
    return modules


def _peft_config(root: nn.Module) -> dict[str, Any]:
    injection = injection_of(root)
    assert injection is not None
    config, layers = injection.config, named_lora_layers(root)
    factor = {name: layer.r**0.5 if config.use_rslora else layer.r for name, layer in layers.items()}
    alphas = {name: _as_integer(layer.lora_scaling * factor[name]) for name, layer in layers.items()}
    ranks = {name: layer.r for name, layer in layers.items()}
    r = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    trained_whole = _modules_trained_whole(root)
    return {
        "peft_type": "LORA",
        "task_type": next((task for ending, task in _TASK_TYPES.items() if type(root).__name__.endswith(ending)), None),
        "base_model_name_or_path": name_or_path(root),
        "revision": None,
        "inference_mode": True,
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": config.dropout,
        "use_rslora": config.use_rslora,
        "use_dora": False,
        "bias": config.bias,
        "target_modules": _target_modules(root, list(layers), trained_whole),
        "exclude_modules": None,
        "modules_to_save": trained_whole or None,
        "rank_pattern": {f"^{re.escape(name)}": value for name, value in ranks.items() if value != r},
        "alpha_pattern": {f"^{re.escape(name)}": value for name, value in alphas.items() if value != alpha},
        "fan_in_fan_out": any(isinstance(layer, LoRAConv1D) for layer in layers.values()),
        "init_lora_weights": True,
        "layers_to_transform": None,
        "layers_pattern": None,
    }


def _target_modules(root: nn.Module, adapted: list[str], trained_whole: list[str]) -> list[str] | str:
    """Return the shortest of suffixes, full names or one expression that PEFT resolves to exactly these layers."""
    names = [clean_name(name) for name, _ in root.named_modules() if clean_name(name)]
    free = [name for name in names if not any(re.match(rf"(^|.*\.){m}($|\..*)", name) for m in trained_whole)]

    def hit(targets: list[str]) -> set[str]:
        return {name for name in free if name in targets or any(name.endswith(f".{target}") for target in targets)}

    suffixes = sorted({name.rpartition(".")[2] for name in adapted})
    for targets in (suffixes, adapted):
        if hit(targets) == set(adapted):
            return targets
    return "|".join(re.escape(name) for name in adapted)


def _as_integer(value: float) -> int | float:
    nearest = round(value)
    return nearest if abs(value - nearest) < 1e-9 * max(1, nearest) else value


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / CONFIG_NAME
    if not path.is_file():
        there = ", ".join(sorted(p.name for p in directory.iterdir())) if directory.is_dir() else "no such directory"
        raise FileNotFoundError(
            f"{directory} is not an adapter directory: it has no {CONFIG_NAME} ({there or 'it is empty'})"
        )
    try:
        config = json.loads(path.read_text())
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise ValueError(f"{path} describes a {kind!r} adapter; only 'LORA' is read")
    for name in _UNSUPPORTED:
        if config.get(name):
            raise ValueError(f"{path} uses {name}={config[name]!r}, which is not supported")
    init = config.get("init_lora_weights", True)
    if init not in _RELATIVE_TO_BASE:
        raise ValueError(
            f"{path} was trained with init_lora_weights={init!r}, which changes the base weights: its tensors "
            "belong to that changed base. Save it from PEFT with path_initial_model_for_weight_conversion to get "
            "an adapter for the original base"
        )
    for name in ("r", "lora_alpha", "target_modules"):
        if config.get(name) is None:
            raise ValueError(f"{path} lacks {name!r}")
    return config


def _read_tensors(directory: Path) -> dict[str, Tensor]:
    path, legacy = directory / WEIGHTS_NAME, directory / LEGACY_WEIGHTS_NAME
    try:
        if path.is_file():
            return safetensors.torch.load_file(path)
        if legacy.is_file():
            tensors = torch.load(legacy, map_location="cpu", weights_only=True)
            return dict(tensors)
    except Exception as error:
        raise ValueError(
            f"{path if path.is_file() else legacy} is damaged or holds more than tensors: {error}"
        ) from error
    raise FileNotFoundError(f"{directory} has neither {WEIGHTS_NAME} nor {LEGACY_WEIGHTS_NAME}")


def _sort_tensors(tensors: Mapping[str, Tensor], directory: Path) -> _Adapter:
    adapter = _Adapter()
    for key, value in tensors.items():
        name = key.removeprefix(PREFIX)
        match = _ADAPTER_KEY.fullmatch(name)
        if match is not None:
            adapter.factors.setdefault(match["layer"], {})[match["factor"]] = value
        elif ".base_layer." in name and not name.endswith(".bias"):
            adapter.base[name.replace(".base_layer.", ".")] = value
        elif ".lora_" in name or ".token_adapter." in name:
            raise ValueError(f"{directory}: tensor {key!r} is of a kind that is not supported")
        else:
            clean = re.sub(r"\.(modules_to_save\.[^.]+|base_layer|original_module)\.", ".", name)
            adapter.trained[clean] = value
    if not adapter.factors:
        raise ValueError(f"{directory} holds no LoRA tensors; its keys begin with {list(tensors)[:3]}")
    for layer, pair in adapter.factors.items():
        if set(pair) != {"A", "B"}:
            raise ValueError(f"{directory}: {layer!r} has only lora_{next(iter(pair))}")
        if pair["A"].ndim != 2 or pair["B"].ndim != 2 or pair["A"].shape[0] != pair["B"].shape[1]:
            raise ValueError(
                f"{directory}: A {tuple(pair['A'].shape)} and B {tuple(pair['B'].shape)} of {layer!r} are no [r, "
                "in] and [out, r]"
            )
    return adapter


def _config_for(model: nn.Module, peft_config: Mapping[str, Any], adapter: _Adapter, directory: Path) -> LoRAConfig:
    """Return our config for a directory, after checking that its tensors fit the model."""
    modules = {clean_name(name): module for name, module in model.named_modules()}
    for layer, pair in adapter.factors.items():
        mixin = mixin_for(modules[layer]) if layer in modules else None
        if mixin is None:
            kind = type(modules[layer]).__name__ if layer in modules else "missing"
            raise ValueError(
                f"{directory} adapts {layer!r}, which is {kind} in {type(model).__name__}: another base model?"
            )
        shapes = (pair["A"].shape[1], pair["B"].shape[0])
        if shapes != mixin.features(modules[layer]):
            raise ValueError(
                f"{directory} adapts {layer!r} as {shapes[0]} -> {shapes[1]}, the model has "
                f"{mixin.features(modules[layer])[0]} -> {mixin.features(modules[layer])[1]}: another base model?"
            )
    _check_trained(model, adapter, directory)

    rank_pattern: dict[str, int] = _live_patterns(peft_config.get("rank_pattern"), adapter)
    alpha_pattern: dict[str, float] = _live_patterns(peft_config.get("alpha_pattern"), adapter)
    # the tensors know the ranks; patterns that PEFT wrote in another order than it applied them do not
    r = int(peft_config["r"])
    ranks = {layer: pair["A"].shape[0] for layer, pair in adapter.factors.items()}
    if any(pattern_value(rank_pattern, layer, r) != rank for layer, rank in ranks.items()):
        rank_pattern = {f"^{re.escape(layer)}": rank for layer, rank in ranks.items() if rank != r}
    trained_modules = _trained_modules(peft_config, adapter, modules)
    config = LoRAConfig(
        r=r,
        alpha=float(peft_config["lora_alpha"]),
        dropout=float(peft_config.get("lora_dropout") or 0.0),
        target_modules=_live(peft_config["target_modules"], modules),
        exclude_modules=_live(peft_config.get("exclude_modules"), modules) or None,
        modules_to_save=trained_modules,
        bias=peft_config.get("bias") or "none",
        use_rslora=bool(peft_config.get("use_rslora")),
        layers_to_transform=peft_config.get("layers_to_transform"),
        layers_pattern=peft_config.get("layers_pattern") or None,
        adapter_dtype="float64" if any(p["A"].dtype == torch.float64 for p in adapter.factors.values()) else "float32",
        rank_pattern=rank_pattern,
        alpha_pattern=alpha_pattern,
    )
    described = set(select_layers(model, config, trained_modules))
    if described != set(adapter.factors):
        without, undescribed = sorted(described - set(adapter.factors)), sorted(set(adapter.factors) - described)
        raise ValueError(
            f"{directory}: config and tensors disagree: no tensors for {without[:3]} ({len(without)} layers), "
            f"tensors that the config does not describe for {undescribed[:3]} ({len(undescribed)} layers). Is a "
            "file damaged, or from another model?"
        )
    return config


def _check_trained(model: nn.Module, adapter: _Adapter, directory: Path) -> None:
    """Check the base tensors in a directory: those that trained must fit, untrained copies must be the model's own."""
    own = {clean_name(n): t for n, t in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]}
    for name, value in (adapter.trained | adapter.base).items():
        if name not in own:
            raise ValueError(f"{directory} holds {name!r}, which {type(model).__name__} lacks: another base model?")
        if value.shape != own[name].shape:
            raise ValueError(
                f"{directory} has {tuple(value.shape)} for {name!r}, the model has {tuple(own[name].shape)}"
            )
    for name, value in adapter.base.items():
        if own[name].device.type != "meta" and not torch.equal(value.bfloat16(), own[name].detach().cpu().bfloat16()):
            raise ValueError(
                f"{directory} brings its own base tensor {name!r}, which differs from the model's (a resized or "
                "trained embedding): load that base first"
            )


def _trained_modules(peft_config: Mapping[str, Any], adapter: _Adapter, modules: Mapping[str, nn.Module]) -> list[str]:
    """Return the modules that PEFT's ``modules_to_save`` means here and the directory has tensors for."""
    entries = peft_config.get("modules_to_save") or []
    found = [name for name in modules if name and any(name.endswith(entry) for entry in entries)]
    return [name for name in found if any(tensor.startswith(f"{name}.") for tensor in adapter.trained)]


def _live_patterns(patterns: Any, adapter: _Adapter) -> dict[str, Any]:
    """Return the patterns that match an adapted layer; PEFT ignores the others."""
    return {
        key: value
        for key, value in (patterns or {}).items()
        if any(re.match(rf"(.*\.)?({key})$", name) for name in adapter.factors)
    }


def _live(targets: Any, modules: Mapping[str, nn.Module]) -> Any:
    """Return the entries of a list that name something; PEFT's lists may name more than the model has."""
    if targets is None or isinstance(targets, str):
        return targets
    return sorted(t for t in targets if any(name == t or name.endswith(f".{t}") for name in modules))
