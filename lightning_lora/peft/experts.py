"""Adapters of single experts, from models that kept each expert as layers of its own, for fused expert tensors."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.peft.config import divisor, rank_of, scaling_of
from lightning_lora.peft.directory import Adapter
from lightning_lora.peft.layout import laid_out

_EXPERT = re.compile(r"(?P<container>.+\.experts)\.(?P<index>\d+)\.(?P<part>\w+)")
_GATE, _UP, _DOWN = ("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")


def fuse_experts(adapter: Adapter, modules: Mapping[str, nn.Module]) -> None:
    """Put the adapters of single experts into the layout of fused ones, and change the config with them.

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
                raise ValueError(
                    f"{adapter.source} adapts {path!r} with more than A and B, which fused experts cannot have"
                )
            group = groups.setdefault(container, {}).setdefault(match["part"], {})
            group[int(match["index"])] = {
                **adapter.factors.pop(path),
                "scaling": scaling_of(adapter.config, path, rank_of(adapter.config, path)),
            }
    for container, parts in groups.items():
        experts = modules[container].get_parameter("gate_up_proj").shape[0]
        stacked = {
            part: _stack(by_index, experts, f"{container}.*.{part}", adapter.source) for part, by_index in parts.items()
        }
        _fuse_one(adapter, container, stacked)


def _fuse_one(adapter: Adapter, container: str, stacked: Mapping[str, tuple[Tensor, Tensor, float]]) -> None:
    gate, up, down = (next((stacked[n] for n in names if n in stacked), None) for names in (_GATE, _UP, _DOWN))
    if (gate is None) != (up is None):
        raise ValueError(f"{adapter.source} adapts only one of the gate and up projections of {container!r}")
    pairs: dict[str, tuple[Tensor, Tensor, float]] = {}
    if gate is not None and up is not None:
        A = torch.cat([gate[0], up[0] * (up[2] / gate[2])], dim=1)  # [E, 2 r, in], both at the gate's scale
        B = torch.stack([torch.block_diag(g, u) for g, u in zip(gate[1], up[1], strict=True)])  # [E, 2 out, 2 r]
        pairs["gate_up_proj"] = (A, B, gate[2])
    if down is not None:
        pairs["down_proj"] = down
    config = adapter.config
    for index, (name, (A, B, scaling)) in enumerate(pairs.items()):
        inner = ".base_layer" * (len(pairs) - 1 - index)
        adapter.factors[f"{container}{inner}"] = {"A": laid_out("experts_A", [A]), "B": laid_out("experts_B", [B])}
        key, r = f"^{re.escape(container)}\\.{name}", A.shape[1]
        config = {
            **config,
            "target_parameters": [*(config.get("target_parameters") or []), f"{container}.{name}"],
            # before the user's patterns: the first that matches counts
            "rank_pattern": {key: r, **(config.get("rank_pattern") or {})},
            "alpha_pattern": {key: scaling * divisor(config, r), **(config.get("alpha_pattern") or {})},
        }
    adapter.config = config


def _stack(
    by_index: Mapping[int, Mapping[str, Any]], experts: int, what: str, source: Any
) -> tuple[Tensor, Tensor, float]:
    """Return A ``[E, r, in]``, B ``[E, out, r]`` and the scale of one projection of all experts."""
    if set(by_index) != set(range(experts)):
        raise ValueError(f"{source} adapts {len(by_index)} experts as {what!r}, the model has {experts}: all or none")
    pairs = [by_index[index] for index in range(experts)]
    shapes = {(tuple(pair["A"].shape), tuple(pair["B"].shape), pair["scaling"]) for pair in pairs}
    if len(shapes) != 1:
        raise ValueError(f"{source}: the experts of {what!r} differ in rank, size or scale, which fused ones cannot")
    return torch.stack([p["A"] for p in pairs]), torch.stack([p["B"] for p in pairs]), pairs[0]["scaling"]
