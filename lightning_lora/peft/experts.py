"""Adapters of single experts, from models that kept each expert as layers of its own, for fused expert tensors."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.checkpoint.storage import Location
from lightning_lora.model.matching import pattern_value
from lightning_lora.peft.directory import Adapter

_EXPERT = re.compile(r"(?P<container>.+\.experts)\.(?P<index>\d+)\.(?P<part>\w+)")
_GATE, _UP, _DOWN = ("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")


def fuse_experts(
    adapter: Adapter, peft_config: dict[str, Any], modules: Mapping[str, nn.Module], directory: Location
) -> dict[str, Any]:
    """Put the adapters of single experts into the layout of fused ones, in place. Returns the config that goes with it.

    ``gate_proj`` and ``up_proj`` become one pair of twice the rank, with ``B`` block-diagonal: the same function.

    Raises:
        ValueError: an expert lacks what others have, or experts differ in rank or scale.
    """
    groups: dict[str, dict[str, dict[int, dict[str, Any]]]] = {}
    for path in list(adapter.factors):
        match = _EXPERT.fullmatch(path)
        if match is None or path in modules:
            continue
        container = match["container"]
        container = container if container in modules else container.replace(".block_sparse_moe.", ".mlp.")
        if container in modules and "gate_up_proj" in modules[container]._parameters:
            if set(adapter.factors[path]) != {"A", "B"}:
                raise ValueError(f"{directory} adapts {path!r} with more than A and B, which fused experts cannot have")
            group = groups.setdefault(container, {}).setdefault(match["part"], {})
            group[int(match["index"])] = {**adapter.factors.pop(path), "scaling": _scaling(peft_config, path)}
    if not groups:
        return peft_config
    config = {**peft_config, "rank_pattern": dict(peft_config.get("rank_pattern") or {})}
    config["alpha_pattern"] = dict(peft_config.get("alpha_pattern") or {})
    config["target_parameters"] = list(peft_config.get("target_parameters") or [])
    for container, parts in groups.items():
        experts = modules[container].get_parameter("gate_up_proj").shape[0]
        stacked = {
            part: _stack(by_index, experts, f"{container}.*.{part}", directory) for part, by_index in parts.items()
        }
        _fuse_one(adapter, config, container, stacked, directory)
    return config


def _fuse_one(
    adapter: Adapter,
    config: dict[str, Any],
    container: str,
    stacked: Mapping[str, tuple[Tensor, Tensor, float]],
    directory: Location,
) -> None:
    gate, up, down = (next((stacked[n] for n in names if n in stacked), None) for names in (_GATE, _UP, _DOWN))
    if (gate is None) != (up is None):
        raise ValueError(f"{directory} adapts only one of the gate and up projections of {container!r}")
    pairs: dict[str, tuple[Tensor, Tensor, float]] = {}
    if gate is not None and up is not None:
        A = torch.cat([gate[0], up[0] * (up[2] / gate[2])], dim=1)  # [E, 2 r, in], both at the gate's scale
        B = torch.stack([torch.block_diag(g, u) for g, u in zip(gate[1], up[1], strict=True)])  # [E, 2 out, 2 r]
        pairs["gate_up_proj"] = (A, B, gate[2])
    if down is not None:
        pairs["down_proj"] = down
    for index, (name, (A, B, scaling)) in enumerate(pairs.items()):
        inner = ".base_layer" * (len(pairs) - 1 - index)
        adapter.factors[f"{container}{inner}"] = {"A": A.flatten(0, 1), "B": B.permute(1, 2, 0).flatten(1)}
        config["target_parameters"].append(f"{container}.{name}")
        key, r = f"^{re.escape(container)}\\.{name}", A.shape[1]
        # before the user's patterns: the first that matches counts
        config["rank_pattern"] = {key: r, **config["rank_pattern"]}
        alpha = scaling * (r**0.5 if config.get("use_rslora") else r)
        config["alpha_pattern"] = {key: alpha, **config["alpha_pattern"]}


def _stack(
    by_index: Mapping[int, Mapping[str, Any]], experts: int, what: str, directory: Location
) -> tuple[Tensor, Tensor, float]:
    """Return A ``[E, r, in]``, B ``[E, out, r]`` and the scale of one projection of all experts."""
    if set(by_index) != set(range(experts)):
        raise ValueError(
            f"{directory} adapts {len(by_index)} experts as {what!r}, the model has {experts}: all or none"
        )
    pairs = [by_index[index] for index in range(experts)]
    shapes = {(tuple(pair["A"].shape), tuple(pair["B"].shape), pair["scaling"]) for pair in pairs}
    if len(shapes) != 1:
        raise ValueError(f"{directory}: the experts of {what!r} differ in rank, size or scale, which fused ones cannot")
    return torch.stack([p["A"] for p in pairs]), torch.stack([p["B"] for p in pairs]), pairs[0]["scaling"]


def _scaling(peft_config: Mapping[str, Any], path: str) -> float:
    r = pattern_value(peft_config.get("rank_pattern"), path, peft_config["r"])
    alpha = pattern_value(peft_config.get("alpha_pattern"), path, peft_config["lora_alpha"])
    return float(alpha / (r**0.5 if peft_config.get("use_rslora") else r))
