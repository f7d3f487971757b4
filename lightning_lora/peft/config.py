"""PEFT's ``adapter_config.json``: which fields are read, what they mean for one layer, and the LoRAConfig they make."""

import json
import math
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

from lightning_lora.checkpoint.storage import Location, location
from lightning_lora.config import LoRAConfig, brief
from lightning_lora.model.matching import pattern_value

CONFIG_NAME = "adapter_config.json"
# initialisations that change the base weights in training, so that the tensors belong to the changed base
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# fields that change what an adapter computes and have no counterpart here
UNSUPPORTED = (
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
_RELATIVE_TO_BASE = (True, False, "gaussian", "orthogonal", "eva", "mica")
_SAME_NAMES = (
    "r",
    "target_modules",
    "exclude_modules",
    "modules_to_save",
    "bias",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "use_dora",
    "lora_bias",
    "layers_to_transform",
    "layers_pattern",
    "target_parameters",
    "trainable_token_indices",
)


def read_json(path: Location) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds something else.
    """
    directory = path.parent
    if not path.is_file():
        there = ", ".join(sorted(p.name for p in directory.iterdir())) if directory.is_dir() else "no such directory"
        raise FileNotFoundError(
            f"{directory} is not an adapter directory: it has no {path.name} ({there or 'it is empty'})"
        )
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged, it is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} is damaged: expected a JSON object, found {type(values).__name__}")
    return values


def rank_of(config: Mapping[str, Any], name: str) -> int:
    """Return the rank that PEFT gives to a layer, or to a parameter, of that name."""
    return int(pattern_value(config.get("rank_pattern"), name, config.get("r", 8)))


def alpha_of(config: Mapping[str, Any], name: str) -> float:
    """Return the numerator of the scale that PEFT gives to a layer, or to a parameter, of that name."""
    return float(pattern_value(config.get("alpha_pattern"), name, config.get("lora_alpha", 8)))


def divisor(config: Mapping[str, Any], r: int) -> float:
    """Return what ``lora_alpha`` is divided by for a pair of rank r."""
    return math.sqrt(r) if config.get("use_rslora") else r


def scaling_of(config: Mapping[str, Any], name: str, r: int) -> float:
    """Return what PEFT multiplies B A by, for a pair of rank r of the layer, or of the parameter, of that name."""
    return alpha_of(config, name) / divisor(config, r)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) and item for item in value)


def _is_expression(value: str) -> bool:
    try:
        re.compile(value)
    except re.error:
        return False
    return True


def _is_patterns(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    return all(_is_number(item) and item > 0 and _is_expression(key) for key, item in value.items())


def _is_indices(value: Any) -> bool:
    lists = list(value.values()) if isinstance(value, dict) else [value]
    return all(isinstance(ids, list) and ids and all(_is_count(i) and i >= 0 for i in ids) for ids in lists)


def _is_target(value: Any) -> bool:
    return isinstance(value, str) or _is_names(value)


_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "r": (lambda value: _is_count(value) and value > 0, "an integer above 0"),
    "lora_alpha": (lambda value: _is_number(value) and value > 0, "a finite number above 0"),
    "lora_dropout": (lambda value: _is_number(value) and 0 <= value < 1, "a probability in [0, 1)"),
    "target_modules": (_is_target, "a string or a list of names"),
    "exclude_modules": (_is_target, "a string or a list of names"),
    "target_parameters": (_is_names, "a list of names"),
    "modules_to_save": (_is_names, "a list of names"),
    "rank_pattern": (
        lambda value: _is_patterns(value) and all(_is_count(r) for r in value.values()),
        "a mapping from regular expressions to ranks",
    ),
    "alpha_pattern": (_is_patterns, "a mapping from regular expressions to numbers above 0"),
    "trainable_token_indices": (_is_indices, "a list of token ids, or such lists by embedding"),
}


def checked(config: dict[str, Any], path: Location) -> dict[str, Any]:
    """Return PEFT's config after checking that it is of a kind that is read here, with fields of the right kinds."""
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{path} describes a {config.get('peft_type')!r} adapter; only 'LORA' is read")
    for name in UNSUPPORTED:
        if config.get(name):
            raise ValueError(f"{path} uses {name}={brief(config[name])}, which is not supported")
    init = config.get("init_lora_weights", True)
    if init not in _RELATIVE_TO_BASE:
        raise ValueError(
            f"{path} was trained with init_lora_weights={init!r}, which changes the base weights: its tensors "
            "belong to that changed base. Save it from PEFT with path_initial_model_for_weight_conversion to get "
            "an adapter for the original base"
        )
    if config.get("target_modules") is None and config.get("target_parameters"):
        config = {**config, "target_modules": []}
    for name in ("r", "lora_alpha", "target_modules"):
        if config.get(name) is None:
            raise ValueError(f"{path} lacks {name!r}")
    for name, (is_right, expected) in _FIELDS.items():
        value = config.get(name)
        if value is not None and not is_right(value):
            raise ValueError(f"{path} has {name}={value!r}; expected {expected}")
    return config


def from_peft(config: Any) -> LoRAConfig:
    """Return the settings of a ``peft.LoraConfig``, of its ``to_dict()``, or of a PEFT directory."""
    values = _values(config)
    kind = getattr(values.get("peft_type", "LORA"), "value", values.get("peft_type", "LORA"))
    if kind != "LORA":
        given = str(config) if isinstance(config, (str, os.PathLike)) else f"the {type(config).__name__}"
        raise ValueError(f"{given} describes a {brief(kind)} adapter; only 'LORA' is read")
    used = [name for name in UNSUPPORTED if values.get(name)]
    if used:
        raise ValueError(f"PEFT's {used[0]}={brief(values[used[0]])} is not supported")
    init = values.get("init_lora_weights", True)
    if init is False or (isinstance(init, str) and init in ("eva", "corda", "loftq", "lora_ga", "mica")):
        raise ValueError(f"PEFT's init_lora_weights={init!r} is not supported")
    if values.get("target_modules") is None and not values.get("target_parameters"):
        raise ValueError("target_modules=None leaves the targets to PEFT's table of models: name them")
    same = {name: values[name] for name in _SAME_NAMES if values.get(name) is not None}
    return LoRAConfig(
        **{"target_modules": [], **same},
        alpha=values.get("lora_alpha", 8),
        dropout=values.get("lora_dropout", 0.0),
        init="kaiming" if init is True else init,
        init_rng="peft",
    )


def _values(config: Any) -> dict[str, Any]:
    if isinstance(config, (str, os.PathLike)):
        path = location(config)
        path = path / CONFIG_NAME if path.is_dir() else path
        values = json.loads(path.read_text())
    else:
        values = config.to_dict() if callable(getattr(config, "to_dict", None)) else config
    if not isinstance(values, Mapping):
        raise TypeError(f"{brief(config)} must be a mapping, a peft.LoraConfig or the path of a PEFT directory")
    return dict(values)


def to_peft(config: LoRAConfig) -> dict[str, Any]:
    """Return keyword arguments for ``peft.LoraConfig`` that mean the same adapter."""
    alphas: dict[str, float] = dict(config.alpha_pattern or {})
    if config.alpha is None:  # an alpha of the user's own counts, and comes first
        alphas |= {key: 2 * r for key, r in (config.rank_pattern or {}).items() if key not in alphas}
    return {
        **{name: getattr(config, name) for name in _SAME_NAMES},
        "lora_alpha": 2 * config.r if config.alpha is None else config.alpha,
        "lora_dropout": config.dropout,
        "alpha_pattern": alphas,
        "init_lora_weights": True if config.init == "kaiming" else config.init,
    }
