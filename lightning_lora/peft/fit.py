"""Give an adapter's pairs of factors our names and layout, after checking that they fit the model."""

import re
from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from lightning_lora.layers import mixin_for, with_options
from lightning_lora.layers.convolution import LoRAConv
from lightning_lora.layers.parameters import own_parameters, sizes_of_parameter
from lightning_lora.model.families import resize_advice
from lightning_lora.peft.config import divisor, rank_of, scaling_of
from lightning_lora.peft.directory import Adapter
from lightning_lora.peft.layout import is_projection, laid_out, times_added, unstacked

Scaled: TypeAlias = tuple[Tensor, Tensor, float]  # A, B and their scale
_EXPERT = re.compile(r"(?P<container>.+\.experts)\.(?P<index>\d+)\.(?P<part>\w+)")
_OPTIONAL = (("magnitude", "use_dora", "lora_magnitude_vector"), ("bias", "lora_bias", "lora_B.bias"))
_GATE, _UP, _DOWN = ("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")


def named_by_layer(adapter: Adapter, modules: Mapping[str, nn.Module], model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of all pairs under our names; changes ``adapter.factors`` to ours, by layer or parameter.

    Raises:
        ValueError: a pair does not fit the model, the config does not tell of it, or experts differ in rank or scale.
    """
    _fuse_experts(adapter, modules)
    variant = next((key for key, what in adapter.keys.items() if what.kind == "variant"), None)
    if variant is not None:
        raise ValueError(f"{adapter.source}: tensor {variant!r} is of a kind that is not supported")
    tensors: dict[str, Tensor] = {}
    pairs: dict[str, dict[str, Tensor]] = {}
    for path, pair in adapter.factors.items():
        _check_parts(path, pair, adapter)
        layer = ".".join(part for part in path.split(".") if part != "base_layer")
        name, owner, part = _owner(layer, path.split(".").count("base_layer"), adapter.config, modules)
        if part is not None:
            pair = _parameter_pair(pair, modules[owner], part, f"{adapter.source} adapts {part!r} of {layer!r} with")
            tensors |= {f"{owner}.lora_{x}_{part}": value for x, value in pair.items()}
        else:
            _check_layer(layer, pair, modules, model, adapter.source)
            if is_projection(layer, modules) and layer.rpartition(".")[0] in adapter.factors:
                pair = {**pair, "B": pair["B"] * times_added(adapter.config)}
            tensors |= {f"{layer}.lora_{x}": value for x, value in pair.items()}
        if name in pairs:  # PEFT saves both where an attention and its out_proj are targets
            raise ValueError(f"{adapter.source} has two adapters for {name!r}, under {path!r} and another name of it")
        pairs[name] = pair
    adapter.factors = pairs
    return tensors | {f"{name}.lora_rows": rows for name, rows in adapter.rows.items()}


def _check_parts(path: str, pair: Mapping[str, Tensor], adapter: Adapter) -> None:
    """Raise ``ValueError`` where a magnitude or a bias lacks that the config tells of, or is there untold."""
    for part, field, key in _OPTIONAL:
        is_asked = bool(adapter.config.get(field))
        if is_asked != (part in pair):
            raise ValueError(
                f"{adapter.source}: its config says {field}={is_asked}, and {path!r} has {'no' if is_asked else 'a'} "
                f"{key}. Is a file damaged?"
            )


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
        for local in own_parameters(module)
        if any(f"{layer}.{local}" == entry or f"{layer}.{local}".endswith(f".{entry}") for entry in wanted)
    ]
    if depth >= len(parts):
        return layer, layer, None
    part = parts[len(parts) - 1 - depth]
    return f"{layer}.{part}", layer, part


def _parameter_pair(pair: dict[str, Tensor], module: nn.Module, part: str, adapts: str) -> dict[str, Tensor]:
    """Return the pair of a module's parameter in our layout."""
    if set(pair) != {"A", "B"}:
        raise ValueError(f"{adapts} {sorted(pair)}; expected A and B alone")
    experts, in_features, out_features = sizes_of_parameter(module, part)
    A, B = pair["A"], pair["B"]
    if A.ndim != 2 or A.shape[1] != in_features or B.shape[0] != out_features or A.shape[0] % experts:
        raise ValueError(
            f"{adapts} A {tuple(A.shape)} and B {tuple(B.shape)}, the model has {experts} x {in_features} -> "
            f"{out_features}: another base model?"
        )
    is_matrix = len(own_parameters(module)[part].shape) == 2
    return pair if is_matrix else dict(zip("AB", unstacked(A, B, A.shape[0] // experts), strict=True))


def _check_layer(
    layer: str, pair: Mapping[str, Tensor], modules: Mapping[str, nn.Module], model: nn.Module, source: Any
) -> None:
    module: Any = modules.get(layer)
    mixin = None if module is None else mixin_for(module)
    if mixin is None:
        kind = "missing" if module is None else type(module).__name__
        raise ValueError(f"{source} adapts {layer!r}, which is {kind} in {type(model).__name__}: another base model?")
    if issubclass(mixin, LoRAConv) and (module.padding_mode != "zeros" or set(module.dilation) != {1}):
        raise ValueError(
            f"{source} adapts {layer!r}, a convolution with dilation={tuple(module.dilation)} and "
            f"padding_mode={module.padding_mode!r}, both of which PEFT leaves out of lora_A: its adapter means another "
            "function here"
        )
    A, B = pair["A"], pair["B"]
    try:
        fits = mixin.shapes(module, A.shape[0]) == (tuple(A.shape), tuple(B.shape))
    except ValueError:  # the layer cannot have this rank
        fits = False
    if not fits:
        sizes, theirs = mixin.features(module), (A[0].numel(), B.shape[0])
        advice = resize_advice(model, f"{layer}.weight", theirs, sizes) or ": another base model?"
        raise ValueError(
            f"{source} adapts {layer!r} as {theirs[0]} -> {theirs[1]}, the model has {sizes[0]} -> {sizes[1]}{advice}"
        )
    more = {f"lora_{part}": tuple(value.shape) for part, value in pair.items() if part not in "AB"}
    try:
        asked = {field: f"lora_{part}" in more for part, field, _ in _OPTIONAL}
        mixin = with_options(mixin, module, adalora="lora_E" in more, **asked)
    except ValueError as error:
        raise ValueError(f"{source} adapts {layer!r} with {', '.join(more)}: {error}") from None
    if more != (expected := mixin.more_shapes(module, A.shape[0])):
        raise ValueError(f"{source} adapts {layer!r} with {more}, the model has {expected}: another base model?")


def _fuse_experts(adapter: Adapter, modules: Mapping[str, nn.Module]) -> None:
    """Fuse the adapters of experts that were layers of their own, where the model has one tensor for all of them.

    The config changes with them. ``gate_proj`` and ``up_proj`` become one pair of twice the rank, with ``B``
    block-diagonal: the same function.
    """
    groups: dict[str, dict[str, dict[int, Scaled]]] = {}
    for path, pair in list(adapter.factors.items()):
        match = _EXPERT.fullmatch(path)
        if match is None or path in modules:
            continue
        container = match["container"]
        container = container if container in modules else container.replace(".block_sparse_moe.", ".mlp.")
        if container in modules and "gate_up_proj" in own_parameters(modules[container]):
            if set(pair) != {"A", "B"}:
                more = f"{path!r} with more than A and B, which fused experts cannot have"
                raise ValueError(f"{adapter.source} adapts {more}")
            scaling = scaling_of(adapter.config, path, rank_of(adapter.config, path))
            by_index = groups.setdefault(container, {}).setdefault(match["part"], {})
            by_index[int(match["index"])] = pair["A"], pair["B"], scaling
            del adapter.factors[path]
    for container, parts in groups.items():
        num_experts = own_parameters(modules[container])["gate_up_proj"].shape[0]
        stacked = {part: _stack(parts[part], num_experts, f"{container}.*.{part}", adapter.source) for part in parts}
        _fuse_one(adapter, container, stacked)


def _stack(by_index: Mapping[int, Scaled], num_experts: int, what: str, source: Any) -> Scaled:
    """Return A ``[E, r, in]``, B ``[E, out, r]`` and the scale of one projection of all experts."""
    if set(by_index) != set(range(num_experts)):
        raise ValueError(
            f"{source} adapts {len(by_index)} experts as {what!r}, the model has {num_experts}: all or none"
        )
    if len({(A.shape, B.shape, scaling) for A, B, scaling in by_index.values()}) != 1:
        raise ValueError(f"{source}: the experts of {what!r} differ in rank, size or scale, which fused ones cannot")
    A, B, scalings = zip(*(by_index[index] for index in range(num_experts)), strict=True)
    return torch.stack(A), torch.stack(B), scalings[0]


def _fuse_one(adapter: Adapter, container: str, stacked: Mapping[str, Scaled]) -> None:
    gate, up, down = (next((stacked[n] for n in names if n in stacked), None) for names in (_GATE, _UP, _DOWN))
    if (gate is None) != (up is None):
        raise ValueError(f"{adapter.source} adapts only one of the gate and up projections of {container!r}")
    pairs: dict[str, Scaled] = {}
    if gate is not None and up is not None:
        A = torch.cat([gate[0], up[0] * (up[2] / gate[2])], dim=1)  # [E, 2 r, in], both at the gate's scale
        B = torch.stack([torch.block_diag(g, u) for g, u in zip(gate[1], up[1], strict=True)])  # [E, 2 out, 2 r]
        pairs["gate_up_proj"] = (A, B, gate[2])
    if down is not None:
        pairs["down_proj"] = down
    config = adapter.config
    for outer, (name, (A, B, scaling)) in enumerate(pairs.items(), start=1):
        inner = ".base_layer" * (len(pairs) - outer)
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
