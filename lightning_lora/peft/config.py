"""PEFT's ``adapter_config.json``: which fields are read, what they mean for one layer, and the LoRAConfig they make."""

import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields
from typing import Any, TypeVar

from lightning_lora.adalora import AdaLoRA
from lightning_lora.checkpoint.storage import Location, location
from lightning_lora.config import LoRAConfig, brief
from lightning_lora.model.matching import pattern_value

V = TypeVar("V")
CONFIG_NAME = "adapter_config.json"
KINDS = ("LORA", "ADALORA")
ADALORA_FIELDS = tuple(field.name for field in fields(AdaLoRA))
# what PEFT's AdaLoRA leaves unread, or uses for what it has pruned
_UNREAD_BY_ADALORA = ("r", "rank_pattern", "alpha_pattern", "use_rslora", "lora_bias")
# initialisations that change the base weights in training, so that the tensors belong to the changed base
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# fields that change what an adapter computes and have no counterpart here
VARIANTS = ("use_qalora", "use_bdlora", "arrow_config", "kasa_config", "monteclora_config", "layer_replication")
UNSUPPORTED = (*VARIANTS, "alora_invocation_tokens", "megatron_config", "velora_config")
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


def anchored(values: Mapping[str, V], default: V) -> tuple[V, dict[str, V]]:
    """Return the value of most layers, and a pattern that hits its full name alone for every other one."""
    most = Counter(values.values()).most_common(1)[0][0] if values else default
    return most, {f"^{re.escape(name)}": value for name, value in values.items() if value != most}


def checked(config: dict[str, Any], path: Location) -> dict[str, Any]:
    """Return PEFT's config after checking that it is of a kind that is read here, with fields of the right kinds."""
    if config.get("peft_type") not in KINDS:
        raise ValueError(f"{path} describes a {config.get('peft_type')!r} adapter; only 'LORA' and 'ADALORA' are read")
    for used in _unsupported(config):
        raise ValueError(f"{path} uses {used}, which is not supported")
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
    dropout = 0.0 if config.get("target_parameters") else config.get("lora_dropout") or 0.0
    try:
        from_peft({**config, "init_lora_weights": True, "lora_dropout": dropout})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None
    return config


def _unsupported(config: Mapping[str, Any]) -> Iterator[str]:
    yield from (f"{name}={brief(config[name])}" for name in UNSUPPORTED if config.get(name))


def from_peft(config: Any) -> LoRAConfig:
    """Return the settings of a ``peft.LoraConfig``, of its ``to_dict()``, or of a PEFT directory."""
    values = _values(config)
    kind = kind_of(values)
    if kind not in KINDS:
        given = str(config) if isinstance(config, (str, os.PathLike)) else f"the {type(config).__name__}"
        raise ValueError(f"{given} describes a {brief(kind)} adapter; only 'LORA' and 'ADALORA' are read")
    for used in _unsupported(values):
        raise ValueError(f"PEFT's {used} is not supported")
    init = values.get("init_lora_weights", True)
    if init is False or (isinstance(init, str) and init in ("eva", "corda", "loftq", "lora_ga", "mica")):
        raise ValueError(f"PEFT's init_lora_weights={init!r} is not supported")
    if values.get("target_modules") is None and not values.get("target_parameters"):
        raise ValueError("target_modules=None leaves the targets to PEFT's table of models: name them")
    is_adalora = kind == "ADALORA"
    unread = _UNREAD_BY_ADALORA if is_adalora else ()
    same = {name: values[name] for name in _SAME_NAMES if values.get(name) is not None and name not in unread}
    return LoRAConfig(
        **{"target_modules": [], **same},
        alpha=values.get("lora_alpha", 8),
        dropout=values.get("lora_dropout", 0.0),
        init="kaiming" if init is True or is_adalora else init,
        init_rng="peft",
        adalora=adalora_of(values),
    )


def kind_of(config: Mapping[str, Any]) -> Any:
    """Return ``peft_type``, which is a string in files and a member of an enumeration in PEFT's configs."""
    kind = config.get("peft_type", "LORA")
    return getattr(kind, "value", kind)


def adalora_of(config: Mapping[str, Any]) -> AdaLoRA | None:
    """Return the settings of AdaLoRA in PEFT's config; ``None`` if it is of LoRA."""
    if kind_of(config) != "ADALORA":
        return None
    return AdaLoRA(**{name: config[name] for name in ADALORA_FIELDS if config.get(name) is not None})


def _values(config: Any) -> dict[str, Any]:
    if isinstance(config, (str, os.PathLike)):
        path = location(config)
        return read_json(path if path.is_file() else path / CONFIG_NAME)
    values = config.to_dict() if callable(getattr(config, "to_dict", None)) else config
    if not isinstance(values, Mapping):
        raise TypeError(f"{brief(config)} must be a mapping, a peft.LoraConfig or the path of a PEFT directory")
    return dict(values)


def to_peft(config: LoRAConfig) -> dict[str, Any]:
    """Return keyword arguments for ``peft.LoraConfig``, or ``peft.AdaLoraConfig``, that mean the same adapter.

    Raises:
        ValueError: AdaLoRA's number of steps is left to the Trainer.
    """
    if config.adalora is not None:
        if config.adalora.total_step is None:
            raise ValueError("peft.AdaLoraConfig needs the number of steps: give AdaLoRA(total_step=...)")
        same = {name: getattr(config, name) for name in _SAME_NAMES if name not in _UNREAD_BY_ADALORA}
        alpha = 2 * config.r if config.alpha is None else config.alpha
        return {**same, "lora_alpha": alpha, "lora_dropout": config.dropout, **asdict(config.adalora)}
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
