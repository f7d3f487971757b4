"""PEFT's files of AdaLoRA adapters, ``B diag(E) A``: read with all their ranks, or written as plain LoRA.

PEFT leaves pruned ranks out of its files and says in ``rank_pattern`` which ones are in. Files of this package hold all
ranks, pruned ones with a zero in E, which PEFT reads as well.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_lora.config import brief
from lightning_lora.peft.config import ADALORA_FIELDS, anchored
from lightning_lora.peft.directory import Files
from lightning_lora.peft.layout import PREFIX

_KEY = re.compile(r"(?P<layer>.+)\.lora_(?P<factor>[ABE])(?P<adapter>\.[^.]+)?")


def with_all_ranks(files: Files, source: Any) -> Files:
    """Return PEFT's files of AdaLoRA with all ranks, under the keys that LoRA's A and B have.

    A pruned rank is zero in A, B and E.

    Raises:
        ValueError: config and tensors disagree, or a layer lacks one of its tensors.
    """
    init_r, pattern = int(files.config.get("init_r", 12)), files.config.get("rank_pattern") or {}
    masks = {re.sub(r"\.lora_E(\.[^.]+)?$", "", key.removeprefix(PREFIX)): mask for key, mask in pattern.items()}
    tensors: dict[str, Tensor] = {}
    found: dict[str, set[str]] = {}
    for key, value in files.tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            tensors[key] = value
            continue
        layer, factor = match["layer"], match["factor"]
        mask = masks.get(layer.removeprefix(PREFIX), [True] * init_r)
        dim = 1 if factor == "B" else 0
        if len(mask) != init_r or value.ndim != 2 or value.shape[dim] != sum(mask):
            raise ValueError(
                f"{source}: {key!r} is {tuple(value.shape)}, and the config says init_r={init_r} and keeps "
                f"{brief(mask)} of its ranks. Is a file damaged?"
            )
        shape = list(value.shape)
        shape[dim] = init_r
        kept = torch.tensor(mask).nonzero().flatten()
        tensors[f"{layer}.lora_{factor}" + ("" if factor == "E" else ".weight")] = value.new_zeros(shape).index_copy(
            dim, kept, value
        )
        found.setdefault(layer, set()).add(factor)
    for layer, factors in found.items():
        if len(factors) < 3:
            lacking = ", ".join(f"lora_{factor}" for factor in "ABE" if factor not in factors)
            raise ValueError(f"{source} is damaged: {layer.removeprefix(PREFIX)!r} has no {lacking}")
    # what PEFT's AdaLoRA does not read, and the number of steps, which was that of the run that wrote it
    unread = {"alpha_pattern": {}, "use_rslora": False, "lora_bias": False, "total_step": None}
    return files._replace(config={**files.config, **unread, "r": init_r, "rank_pattern": {}}, tensors=tensors)


def check_has_ranks(tensors: Mapping[str, Tensor]) -> None:
    """Raise ``ValueError`` for an AdaLoRA adapter none of whose layers has a rank."""
    if not any(bool(value.any()) for key, value in tensors.items() if key.endswith(".lora_E")):
        raise ValueError("the ranks of all layers are zero: the adapter has not trained, and there is nothing to write")


def as_lora(
    config: dict[str, Any], tensors: dict[str, Tensor], *, keep_layers: bool
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return an AdaLoRA adapter with all its ranks as plain LoRA that computes the same, without the pruned ranks.

    A becomes ``E * A``, B becomes ``alpha / (init_r + 1e-5) * B``, and each layer's alpha is its rank. A and B may be
    on the meta device, where E is not.

    Args:
        keep_layers: write one rank of zeros for a layer without ranks, which is left out otherwise.
    """
    scaling = config["lora_alpha"] / (config["init_r"] + 1e-5)
    layers = [key.removesuffix(".lora_E") for key in tensors if key.endswith(".lora_E")]
    written = {key: value for key, value in tensors.items() if _KEY.fullmatch(key) is None}
    ranks: dict[str, int] = {}
    for layer in layers:
        A, B, E = (tensors[f"{layer}.lora_{factor}"] for factor in "ABE")
        kept = (E != 0).flatten()
        if not bool(kept.any()):
            kept[0] = keep_layers
        if bool(kept.any()):
            indices = kept.nonzero().flatten().to(A.device)
            written[f"{layer}.lora_A.weight"] = (A * E.to(A.device)).index_select(0, indices)
            written[f"{layer}.lora_B.weight"] = B.index_select(1, indices) * scaling
            ranks[layer.removeprefix(PREFIX)] = int(kept.sum())
    r, pattern = anchored(ranks, 1)
    plain = {"peft_type": "LORA", "r": r, "lora_alpha": r, "rank_pattern": pattern, "alpha_pattern": pattern}
    if len(ranks) < len(layers):  # only an expression names these layers and no others
        plain["target_modules"] = "|".join(map(re.escape, ranks))
    return {**{key: value for key, value in config.items() if key not in ADALORA_FIELDS}, **plain}, written
