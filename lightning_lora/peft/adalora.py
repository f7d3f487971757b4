"""PEFT's files of AdaLoRA adapters, ``B diag(E) A``, and the same adapters as plain LoRA.

PEFT leaves pruned ranks out of its files and says in ``rank_pattern`` which ranks are in. Files of this package hold all
ranks, the pruned ones with a zero in E, which PEFT reads as well.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_lora.adalora import AdaLoRA
from lightning_lora.config import brief
from lightning_lora.peft.layout import PREFIX

FIELDS = ("target_r", "init_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step")
_KEY = re.compile(r"(?P<layer>.+)\.lora_(?P<factor>[ABE])(?P<adapter>\.[^.]+)?")


def settings_in(config: Mapping[str, Any]) -> AdaLoRA:
    """Return the settings of AdaLoRA in PEFT's config."""
    return AdaLoRA(**{name: config[name] for name in FIELDS if config.get(name) is not None})


def is_adalora(config: Mapping[str, Any]) -> bool:
    """Return True if PEFT's config is of AdaLoRA."""
    kind = config.get("peft_type")
    return getattr(kind, "value", kind) == "ADALORA"


def divisor_of(config: Mapping[str, Any]) -> float:
    """Return what PEFT divides ``lora_alpha`` by."""
    return float(config.get("init_r", 12)) + 1e-5


def unpruned(config: Mapping[str, Any], tensors: Mapping[str, Tensor], source: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return PEFT's config and tensors of AdaLoRA with all ranks, and the keys of A and B as in files of LoRA.

    A pruned rank is zero in A, B and E.

    Raises:
        ValueError: config and tensors disagree.
    """
    init_r, pattern = int(config.get("init_r", 12)), config.get("rank_pattern") or {}
    kept = {re.sub(r"\.lora_E(\.[^.]+)?$", "", key.removeprefix(PREFIX)): value for key, value in pattern.items()}
    restored: dict[str, Tensor] = {}
    for key, value in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            restored[key] = value
            continue
        layer, factor = match["layer"], match["factor"]
        mask = kept.get(layer.removeprefix(PREFIX), [True] * init_r)
        dim = 1 if factor == "B" else 0
        if len(mask) != init_r or value.ndim != 2 or value.shape[dim] != sum(mask):
            raise ValueError(
                f"{source}: {key!r} is {tuple(value.shape)}, and the config says init_r={init_r} and "
                f"rank_pattern={brief(mask)}. Is a file damaged?"
            )
        shape = list(value.shape)
        shape[dim] = init_r
        whole = value.new_zeros(shape)
        whole.index_copy_(dim, torch.tensor(mask).nonzero().flatten(), value)
        restored[f"{layer}.lora_{factor}" + ("" if factor == "E" else ".weight")] = whole
    return {**config, "r": init_r, "rank_pattern": {}}, restored


def as_lora(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return an AdaLoRA adapter with all ranks as plain LoRA that computes the same, without its pruned ranks.

    A becomes ``E * A``, B becomes ``scaling * B``, and alpha is each layer's rank. A layer of no ranks is left out.

    Raises:
        ValueError: no layer has a rank.
    """
    from lightning_lora.peft.config import anchored  # which imports this file

    scaling = float(config["lora_alpha"]) / divisor_of(config)
    layers = {key.removesuffix(".lora_E"): value for key, value in tensors.items() if key.endswith(".lora_E")}
    written: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for layer, E in layers.items():
        keep = (E != 0).flatten()
        if bool(keep.any()):
            written[f"{layer}.lora_A.weight"] = (tensors[f"{layer}.lora_A"] * E)[keep]
            written[f"{layer}.lora_B.weight"] = tensors[f"{layer}.lora_B"][:, keep] * scaling
            ranks[layer.removeprefix(PREFIX)] = int(keep.sum())
    if not ranks:
        raise ValueError("all ranks of all layers are zero: the adapter has not trained, and there is nothing to write")
    factors = {f"{layer}.lora_{factor}" for layer in layers for factor in "ABE"}
    r, pattern = anchored(ranks, 8)
    changed = {"peft_type": "LORA", "r": r, "lora_alpha": r, "rank_pattern": pattern, "alpha_pattern": pattern}
    if len(ranks) < len(layers):  # only an expression names these layers and no others
        changed["target_modules"] = "|".join(map(re.escape, ranks))
    kept = {key: value for key, value in config.items() if key not in FIELDS}
    return {**kept, **changed}, {**{key: value for key, value in tensors.items() if key not in factors}, **written}
