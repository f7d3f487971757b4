"""A weighted sum of PEFT adapters as one PEFT adapter: exact by concatenation, or truncated to a rank."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from lightning_lora.checkpoint.storage import Location, location
from lightning_lora.model.state import OnNonfinite, check_finite
from lightning_lora.peft.directory import Files, read_files, write_directory
from lightning_lora.peft.factors import Factors, folded, write_factors
from lightning_lora.peft.portable import read_factors

# what says which layers are adapted, besides target_parameters
_SELECTION = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
# what changes the model or the tokens that are adapted, and so must be one for all
_SHARED = ("base_model_name_or_path", "layer_replication", "alora_invocation_tokens")

_Path = str | os.PathLike[str]


def combine(
    directories: Sequence[_Path],
    weights: Sequence[float] | None,
    output: _Path,
    *,
    r: int | None = None,
    on_nonfinite: OnNonfinite = "error",
) -> None:
    """Write the adapter ``sum_i weights[i] * scaling_i * B_i A_i`` of several PEFT directories into ``output``.

    Without r the factors are concatenated, which is exact; the ranks add up. With r each layer is the best
    approximation of that rank (Eckart and Young 1936), found without ever forming the [out, in] sum. An adapter that
    lacks a layer adds nothing to it. The result has one rank, ``lora_alpha`` equal to it, and no patterns.

    Args:
        weights: one per directory, of any sign; None for 1 each.
        r: the rank of the result, at most the largest sum of ranks.
        on_nonfinite: what to do about an adapter that holds NaN or infinity.

    Raises:
        FileNotFoundError: a directory, its config or its tensors are missing.
        ValueError: no directories, weights that do not fit, adapters that are more than LoRA's factors, of different
            base models, with layers of different shapes, or with NaN or infinity, or r above what is there.
    """
    factor_of = _checked_weights(directories, weights)
    adapters = {location(directory): read_files(location(directory)) for directory in directories}
    for path, files in adapters.items():
        check_finite(files.tensors, path, on_nonfinite)
    layers_of = {path: _layers(path, files) for path, files in adapters.items()}
    configs = {path: files.config for path, files in adapters.items()}
    _check_shared(configs)
    metadata = _shared_metadata({path: files.metadata for path, files in adapters.items()})
    layers: dict[str, list[tuple[Location, Factors]]] = {}
    for directory, factor in zip(directories, factor_of, strict=True):
        path = location(directory)
        for layer, factors in layers_of[path].items():
            layers.setdefault(layer, []).append((path, replace(factors, scaling=factors.scaling * factor)))
    summed = {layer: _concatenated(parts) for layer, parts in layers.items()}
    largest = max(factors.rank for factors in summed.values())
    if r is not None:
        if not 1 <= r <= largest:
            raise ValueError(f"r={r}: expected 1 to {largest}, the largest sum of the adapters' ranks; or None, exact")
        summed = {layer: _truncated(factors, r) for layer, factors in summed.items()}
    config, tensors = write_factors(_config(list(configs.values()), summed), summed, r or largest)
    check_finite(tensors, output, on_nonfinite)
    write_directory(output, Files(config, tensors, metadata))


def _checked_weights(directories: Sequence[_Path], weights: Sequence[float] | None) -> list[float]:
    if isinstance(directories, str | os.PathLike) or not directories:
        raise ValueError(f"directories={directories!r}: expected a list of one or more adapter directories")
    weights = [1.0] * len(directories) if weights is None else [float(weight) for weight in weights]
    if len(weights) != len(directories):
        raise ValueError(f"{len(weights)} weights for {len(directories)} directories: expected one for each")
    if not all(math.isfinite(weight) for weight in weights):
        raise ValueError(f"weights={weights}: expected finite numbers")
    return weights


def _check_shared(configs: Mapping[Location, Mapping[str, Any]]) -> None:
    for field in _SHARED:
        given = {path: config[field] for path, config in configs.items() if config.get(field)}
        # the name of the base may be left out, a field that changes the model may not
        values = list(given.values()) + [None] * (field != "base_model_name_or_path" and len(given) < len(configs))
        if any(value != values[0] for value in values):
            there = ", ".join(f"{value!r} ({path})" for path, value in given.items())
            raise ValueError(f"the adapters differ in {field}: {there}; expected adapters of one base model")


def _shared_metadata(recorded: Mapping[Location, Mapping[str, Any]]) -> dict[str, Any]:
    """Return what lightning_lora recorded about the base of the adapters, which must be one base."""
    first: tuple[Location, Mapping[str, Any]] | None = None
    for path, metadata in recorded.items():
        base = metadata.get("base")
        if not base:
            continue
        if first is None:
            first = path, metadata
        other = first[1]["base"]
        theirs = dict(zip(other["names"], zip(other["hashes"], other["dtypes"], strict=True), strict=True))
        for name, value, dtype in zip(base["names"], base["hashes"], base["dtypes"], strict=True):
            their_value, their_dtype = theirs.get(name, (value, dtype))
            # float16 and another dtype round twice, and are not compared
            if value != their_value and (dtype == their_dtype or "float16" not in (dtype, their_dtype)):
                raise ValueError(
                    f"{path} was trained on another base model than {first[0]}: the base tensor {name!r} held other "
                    "values; expected adapters of one base model"
                )
    return {} if first is None else dict(first[1])


def _concatenated(parts: Sequence[tuple[Location, Factors]]) -> Factors:
    """Return one pair of factors whose product is the sum of the parts' scaled products."""
    first_path, first = parts[0]
    for path, part in parts:
        if part.num_groups > 1:
            raise ValueError(
                f"{part.name!r} of {path} is a convolution in {part.num_groups} groups: expected layers without "
                "groups. Leave it out of target_modules, or merge the adapters one by one."
            )
        if _described(part) != _described(first):
            raise ValueError(
                f"{part.name!r} differs: {_described(first)} in {first_path}, {_described(part)} in {path}; expected "
                "adapters of one base model with the same parameters of it"
            )
    A = torch.cat([part.A for _, part in parts], dim=1)
    B = torch.cat([folded(part) for _, part in parts], dim=first.rank_dim)
    return replace(first, A=A, B=B, scaling=1.0)


def _described(part: Factors) -> str:
    """Say what must be the same to add two adapters of a layer: everything but the rank."""
    kind = "embedding" if ".lora_embedding_" in part.keys[0] else "layer"
    if part.parameters:
        kind = f"one of {', '.join(part.parameters)} for {part.A.shape[0]} experts"
    return f"{kind} with A [r, {', '.join(map(str, part.A.shape[2:]))}] and B [{part.B.shape[part.rank_dim - 1]}, r]"


def _truncated(factors: Factors, r: int) -> Factors:
    """Return the factors of the best approximation of rank r, for each expert on its own.

    With ``B = Q_B R_B`` and ``A^T = Q_A R_A`` the singular values of B A are those of ``R_B R_A^T``, which is
    [rank, rank]. In float64, since squares of small singular values would be lost.
    """
    A = factors.A.flatten(2).double()  # [experts, rank, in]
    B = (factors.B if factors.parameters else factors.B.flatten(1).unsqueeze(0)).double()  # [experts, out, rank]
    Q_B, R_B = torch.linalg.qr(B)
    Q_A, R_A = torch.linalg.qr(A.mT)
    core = R_B @ R_A.mT
    if not torch.isfinite(core).all():
        raise ValueError(f"the factors of {factors.name!r} hold values that are not finite: is an adapter damaged?")
    U, S, V_T = torch.linalg.svd(core, full_matrices=False)
    root = S[:, :r].sqrt()
    B = Q_B @ (U[..., :r] * root.unsqueeze(-2))
    A = (root.unsqueeze(-1) * V_T[:, :r]) @ Q_A.mT
    B = B if factors.parameters else B[0].unflatten(1, (-1, *factors.B.shape[2:]))
    dtype_A, dtype_B = (torch.promote_types(factor.dtype, torch.float32) for factor in (factors.A, factors.B))
    return replace(factors, A=A.unflatten(2, factors.A.shape[2:]).to(dtype_A), B=B.to(dtype_B))


def _config(configs: Sequence[Mapping[str, Any]], layers: Mapping[str, Factors]) -> dict[str, Any]:
    """Keep the fields that all configs agree on, and describe the union of their layers."""
    first = configs[0]
    common = {key: value for key, value in first.items() if all(config.get(key) == value for config in configs)}
    bases = [config["base_model_name_or_path"] for config in configs if config.get("base_model_name_or_path")]
    parameters = sorted({target for config in configs for target in config.get("target_parameters") or ()})
    selection = {field: first.get(field) for field in _SELECTION}
    if any(_selection(config) != _selection(first) for config in configs):
        full = sorted({factors.module for factors in layers.values() if not factors.parameters})
        selection = {**dict.fromkeys(_SELECTION), "target_modules": full}
    return {
        **common,
        **selection,
        "peft_type": "LORA",
        "task_type": common.get("task_type"),
        "base_model_name_or_path": bases[0] if bases else None,
        "target_parameters": parameters or None,
        "fan_in_fan_out": any(config.get("fan_in_fan_out") for config in configs),
        "lora_dropout": common.get("lora_dropout", 0.0),
        "bias": "none",
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _selection(config: Mapping[str, Any]) -> list[Any]:
    """Return the selection in a form to compare: lists are sets to PEFT."""
    values = [config.get(field) or None for field in _SELECTION]
    return [sorted(value, key=str) if isinstance(value, list) else value for value in values]


def _layers(directory: Location, files: Files) -> dict[str, Factors]:
    try:
        return read_factors(files, directory)
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from error
