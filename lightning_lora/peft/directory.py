"""The files of a PEFT directory, as PEFT 0.21 has them: ``adapter_config.json`` and ``adapter_model.safetensors``.

Names and layouts of tensors only; nothing here knows a model.
"""

import io
import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from lightning_lora.checkpoint.storage import Location, RemotePath, location, write_atomically
from lightning_lora.config import PEFT_UNSUPPORTED, brief
from lightning_lora.model.finite import OnNonfinite, check_finite
from lightning_lora.model.names import clean_name

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
LEGACY_WEIGHTS_NAME = "adapter_model.bin"
PREFIX = "base_model.model."
METADATA = "lightning_lora"  # what PEFT has no field for, in the metadata of the tensors' file

_RELATIVE_TO_BASE = (True, False, "gaussian", "orthogonal", "eva", "mica")
_ADAPTER_KEY = re.compile(r"(?P<layer>.+)\.lora_(?P<kind>embedding_)?(?P<factor>[AB])(\.[^.]+)??(?P<weight>\.weight)?")
_MAGNITUDE_KEY = re.compile(r"(?P<layer>.+)\.lora_magnitude_vector(\.[^.]+)??(\.weight)?")
_BIAS_KEY = re.compile(r"(?P<layer>.+)\.lora_B(\.[^.]+)?\.bias")
_ROWS_KEY = re.compile(r"(?P<layer>.+)\.token_adapter\.trainable_tokens_delta(\.[^.]+)?")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) and item for item in value)


def _is_patterns(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    return all(_is_number(item) and item > 0 and _is_expression(key) for key, item in value.items())


def _is_expression(value: str) -> bool:
    try:
        re.compile(value)
    except re.error:
        return False
    return True


def _is_indices(value: Any) -> bool:
    lists = list(value.values()) if isinstance(value, dict) else [value]
    return all(isinstance(ids, list) and ids and all(_is_count(i) and i >= 0 for i in ids) for ids in lists)


_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "r": (lambda value: _is_count(value) and value > 0, "an integer above 0"),
    "lora_alpha": (lambda value: _is_number(value) and value > 0, "a finite number above 0"),
    "lora_dropout": (lambda value: _is_number(value) and 0 <= value < 1, "a probability in [0, 1)"),
    "target_modules": (lambda value: isinstance(value, str) or _is_names(value), "a string or a list of names"),
    "exclude_modules": (lambda value: isinstance(value, str) or _is_names(value), "a string or a list of names"),
    "target_parameters": (_is_names, "a list of names"),
    "modules_to_save": (_is_names, "a list of names"),
    "rank_pattern": (
        lambda value: _is_patterns(value) and all(_is_count(r) for r in value.values()),
        "a mapping from regular expressions to ranks",
    ),
    "alpha_pattern": (_is_patterns, "a mapping from regular expressions to numbers above 0"),
    "trainable_token_indices": (_is_indices, "a list of token ids, or such lists by embedding"),
}


@dataclass
class Adapter:
    """The tensors of a directory, sorted: what each one is follows from its key alone.

    Attributes:
        factors: A and B in PEFT's layout, and ``magnitude`` or ``bias`` where there is one, by the layer's name;
            ``base_layer`` parts stay in it.
        rows: rows of embeddings that trained, by the embedding's name.
        trained: base tensors that trained, by name.
        base: copies of base tensors that did not train, by name.
        metadata: what lightning_lora recorded beside them.
    """

    factors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)
    trained: dict[str, Tensor] = field(default_factory=dict)
    base: dict[str, Tensor] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Entry:
    """How one tensor of the file is made from tensors of the model: see :func:`laid_out`."""

    key: str
    layout: str
    names: Sequence[str]


def laid_out(layout: str, tensors: Sequence[Tensor]) -> Tensor:
    """Return one tensor in PEFT's layout.

    ``"plain"`` is the tensor itself. ``"experts_A"`` makes ``[E, r, in]`` expert-major rows ``[E r, in]``;
    ``"experts_B"`` makes ``[E, out, r]`` rank-major columns ``[out, r E]``. ``"residual_A"`` and ``"residual_B"`` put
    an adapter and its start under one another, ``[A; A0]`` and ``[B, -B0]``: the difference from the original base.
    ``"rows_<first>_<count>_<all>"`` takes so many rows from the first on of every ``all``: q of a stack of q, k and v.
    """
    first = tensors[0]
    if layout == "experts_A":
        return first.flatten(0, 1)
    if layout == "experts_B":
        return first.permute(1, 2, 0).flatten(1)
    if layout == "residual_A":
        return torch.cat([first, tensors[1]])
    if layout == "residual_B":
        return torch.cat([first, -tensors[1]], dim=1)
    if layout.startswith("rows_"):
        start, count, group = map(int, layout.split("_")[1:])
        return first.view(-1, group, *first.shape[1:])[:, start : start + count].flatten(0, 1).contiguous()
    assert layout == "plain", layout
    return first


def write_directory(
    directory: str | os.PathLike[str],
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, Any] | None = None,
    *,
    on_nonfinite: OnNonfinite = "error",
) -> None:
    """Write both files; each is there in full or not at all.

    Raises:
        ValueError: a tensor holds NaN or infinity, unless ``on_nonfinite`` is "warn". Nothing is written then.
    """
    check_finite(tensors, directory, on_nonfinite)
    directory = location(directory)
    strings = {"format": "pt"}
    if metadata:
        strings[METADATA] = json.dumps(metadata, sort_keys=True)
    contiguous = {name: value.detach().to("cpu").contiguous() for name, value in tensors.items()}
    write_atomically(directory / WEIGHTS_NAME, _in_order(safetensors.torch.save(contiguous, strings)))
    write_atomically(directory / CONFIG_NAME, (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())


def _in_order(content: bytes) -> bytes:
    """Return the same safetensors file with its metadata sorted: the library writes them in no order of its own."""
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[8 + size :]


def read_config(directory: Location) -> dict[str, Any]:
    """Return the config of a directory with a LoRA adapter for the original base.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no JSON, of another kind of adapter, or of one that is not supported.
    """
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
    return checked_config(config, path)


def checked_config(config: Any, path: Location) -> dict[str, Any]:
    """Return PEFT's config after checking that it is of a kind that is read here, with fields of the right kinds."""
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise ValueError(f"{path} describes a {kind!r} adapter; only 'LORA' is read")
    for name in PEFT_UNSUPPORTED:
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
        config["target_modules"] = []
    for name in ("r", "lora_alpha", "target_modules"):
        if config.get(name) is None:
            raise ValueError(f"{path} lacks {name!r}")
    for name, (is_right, expected) in _FIELDS.items():
        value = config.get(name)
        if value is not None and not is_right(value):
            raise ValueError(f"{path} has {name}={value!r}; expected {expected}")
    return config


def read_tensors(directory: Location) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors of a directory by key, and lightning_lora's metadata. No code of the file is run."""
    path, legacy = directory / WEIGHTS_NAME, directory / LEGACY_WEIGHTS_NAME
    try:
        if path.is_file():
            tensors, strings = load_safetensors(path)
            return tensors, json.loads(strings[METADATA]) if METADATA in strings else {}
        if legacy.is_file():
            return dict(torch.load(io.BytesIO(legacy.read_bytes()), map_location="cpu", weights_only=True)), {}
    except Exception as error:
        raise ValueError(
            f"{path if path.is_file() else legacy} is damaged or holds more than tensors: {error}"
        ) from error
    raise FileNotFoundError(f"{directory} has neither {WEIGHTS_NAME} nor {LEGACY_WEIGHTS_NAME}")


def load_safetensors(path: Location) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return a file's tensors and its metadata."""
    if isinstance(path, RemotePath):
        content = path.read_bytes()
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        return safetensors.torch.load(content), header.get("__metadata__", {})
    with safetensors.safe_open(path, framework="pt") as file:
        strings: dict[str, str] = file.metadata() or {}
    return safetensors.torch.load_file(path), strings


def sorted_tensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any], directory: Location) -> Adapter:
    """Sort a file's tensors by their keys.

    Raises:
        ValueError: there are no LoRA tensors, half a pair, a pair whose sizes do not fit, or another method's tensor.
    """
    adapter = Adapter(metadata=dict(metadata))
    for key, value in tensors.items():
        is_adapter = any(f".{part}" in key for part in ("lora_", "token_adapter.", "base_layer."))
        if not isinstance(value, Tensor) or (is_adapter and not value.is_floating_point()):
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{directory}: {key!r} is {kind}, expected a floating-point tensor")
        name = clean_name(key.removeprefix(PREFIX))  # PEFT keeps the name that torch.compile puts in
        if ".original_module." in name:  # the untrained twin of a module that trained
            continue
        match, rows = _ADAPTER_KEY.fullmatch(name), _ROWS_KEY.fullmatch(name)
        magnitude, bias = _MAGNITUDE_KEY.fullmatch(name), _BIAS_KEY.fullmatch(name)
        if bias is not None:  # first: to the key of a factor, "bias" would be an adapter's name
            adapter.factors.setdefault(bias["layer"], {})["bias"] = value
        elif match is not None:
            adapter.factors.setdefault(match["layer"], {})[match["factor"]] = value
        elif magnitude is not None:
            adapter.factors.setdefault(magnitude["layer"], {})["magnitude"] = value
        elif rows is not None:
            adapter.rows[rows["layer"]] = value
        elif ".base_layer." in name and not name.endswith(".bias"):
            adapter.base[name.replace(".base_layer.", ".")] = value
        elif ".lora_" in name or ".token_adapter." in name:
            raise ValueError(f"{directory}: tensor {key!r} is of a kind that is not supported")
        else:
            clean = clean_name(_without_wrapper(key, tensors).removeprefix(PREFIX))
            adapter.trained[re.sub(r"\.base_layer\.", ".", clean)] = value
    if not adapter.factors:
        raise ValueError(f"{directory} holds no LoRA tensors; its keys begin with {list(tensors)[:3]}")
    for layer, pair in adapter.factors.items():
        _check_pair(layer, pair, directory)
    return adapter


def _without_wrapper(key: str, tensors: Mapping[str, Tensor]) -> str:
    """Return the key without the part of PEFT's wrapper, ``modules_to_save`` or ``modules_to_save.<adapter>``.

    With ``bias="all"`` PEFT writes the biases of trained modules twice, once without the adapter's name.
    """
    plain = key.replace(".modules_to_save.", ".")
    if plain in tensors or re.search(r"\.modules_to_save\.[^.]+$", key):
        return plain
    return re.sub(r"\.modules_to_save\.[^.]+\.", ".", key)


def _check_pair(layer: str, pair: Mapping[str, Tensor], directory: Location) -> None:
    if not {"A", "B"} <= set(pair):
        raise ValueError(f"{directory}: {layer!r} has only {', '.join(f'lora_{part}' for part in pair)}")
    A, B = pair["A"], pair["B"]
    if A.ndim != B.ndim or A.ndim < 2 or 0 in A.shape or 0 in B.shape or (A.ndim == 2 and A.shape[0] != B.shape[1]):
        raise ValueError(
            f"{directory}: A {tuple(A.shape)} and B {tuple(B.shape)} of {layer!r} are no [r, in] and [out, r]"
        )
