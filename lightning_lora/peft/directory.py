"""The files of a PEFT directory, ``adapter_config.json`` and ``adapter_model.safetensors``: one reader, one writer.

Names and layouts of tensors only; nothing here knows a model.
"""

import io
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from lightning_lora.checkpoint.atomic_io import write_atomically
from lightning_lora.checkpoint.storage import Location, RemotePath, location
from lightning_lora.peft.config import CONFIG_NAME, kind_of, read_json
from lightning_lora.peft.layout import Key, parse_key

WEIGHTS_NAME = "adapter_model.safetensors"
LEGACY_WEIGHTS_NAME = "adapter_model.bin"
METADATA = "lightning_lora"  # what PEFT has no field for, in the metadata of the tensors' file


class Files(NamedTuple):
    """What a directory's files hold: the config, the tensors by key, and what lightning_lora recorded beside them."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    metadata: dict[str, Any]


@dataclass
class Adapter:
    """The tensors of a directory, sorted by what they are.

    Attributes:
        source: where they are from, for messages.
        config: PEFT's config.
        metadata: what lightning_lora recorded beside them.
        keys: what each tensor is, by its key.
        factors: A and B in PEFT's layout, and ``E``, ``magnitude`` or ``bias`` where there is one, by the layer's name;
            ``base_layer`` parts stay in it.
        rows: rows of embeddings that trained, by the embedding's name.
        trained: base tensors that trained, by name.
        base: copies of base tensors that did not train, by name.
    """

    source: Any
    config: dict[str, Any]
    metadata: dict[str, Any]
    keys: dict[str, Key] = field(default_factory=dict)
    factors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)
    trained: dict[str, Tensor] = field(default_factory=dict)
    base: dict[str, Tensor] = field(default_factory=dict)


def read_files(directory: Location) -> Files:
    """Return what a directory holds. No code of the files is run.

    Raises:
        FileNotFoundError: the config or the tensors are missing.
        ValueError: a file is damaged.
    """
    config = read_json(directory / CONFIG_NAME)
    path, legacy = directory / WEIGHTS_NAME, directory / LEGACY_WEIGHTS_NAME
    if not path.is_file() and not legacy.is_file():
        raise FileNotFoundError(f"{directory} has neither {WEIGHTS_NAME} nor {LEGACY_WEIGHTS_NAME}")
    try:
        if path.is_file():
            tensors, strings = load_safetensors(path)
            return Files(config, tensors, json.loads(strings[METADATA]) if METADATA in strings else {})
        path = legacy
        tensors = dict(torch.load(io.BytesIO(path.read_bytes()), map_location="cpu", weights_only=True))
        return Files(config, tensors, {})
    except Exception as error:
        raise ValueError(f"{path} is damaged or holds more than tensors: {error}") from error


def load_safetensors(path: Location) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return a file's tensors and its metadata."""
    if isinstance(path, RemotePath):
        content = path.read_bytes()
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        return safetensors.torch.load(content), header.get("__metadata__", {})
    with safetensors.safe_open(path, framework="pt") as file:
        strings: dict[str, str] = file.metadata() or {}
    return safetensors.torch.load_file(path), strings


def sorted_tensors(files: Files, source: Any) -> Adapter:
    """Sort a file's tensors by what their keys say.

    Raises:
        ValueError: there are no pairs of factors, half a pair, or a pair whose sizes do not fit.
    """
    adapter = Adapter(source, files.config, files.metadata)
    for key, value in files.tensors.items():
        if ".original_module." in key:  # the untrained twin of a module that trained
            continue
        kind, name, _ = adapter.keys[key] = parse_key(key)
        if kind == "E" and kind_of(files.config) != "ADALORA":
            raise ValueError(f"{source}: tensor {key!r} is AdaLoRA's, and the config is not. Is a file damaged?")
        if not isinstance(value, Tensor) or (kind != "trained" and not value.is_floating_point()):
            found = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{source} is damaged: {key!r} is {found}, expected a floating-point tensor")
        if kind in ("A", "B", "E", "magnitude", "bias"):
            adapter.factors.setdefault(name, {})[kind] = value
        elif kind == "trained":
            adapter.trained[parse_key(_without_wrapper(key, files.tensors)).name] = value
        elif kind != "variant":
            (adapter.rows if kind == "rows" else adapter.base)[name] = value
    if not adapter.factors:
        raise ValueError(
            f"{source} has no lora_A and lora_B among its {len(files.tensors)} tensors: is it LoRA's? Its keys begin "
            f"with {list(files.tensors)[:3]}"
        )
    for layer, pair in adapter.factors.items():
        _check_pair(layer, pair, source)
    return adapter


def _without_wrapper(key: str, tensors: Mapping[str, Tensor]) -> str:
    """Return the key without the part of PEFT's wrapper, ``modules_to_save`` or ``modules_to_save.<adapter>``.

    With ``bias="all"`` PEFT writes the biases of trained modules twice, once without the adapter's name.
    """
    plain = key.replace(".modules_to_save.", ".")
    if plain in tensors or re.search(r"\.modules_to_save\.[^.]+$", key):
        return plain
    return re.sub(r"\.modules_to_save\.[^.]+\.", ".", key)


def _check_pair(layer: str, pair: Mapping[str, Tensor], source: Any) -> None:
    shapes = {part: tuple(value.shape) for part, value in pair.items()}
    if not {"A", "B"} <= set(shapes):
        has = f"it has only {', '.join(f'lora_{part}' for part in shapes)}"
        raise ValueError(f"{source} is damaged: the factors of {layer!r} do not fit: {has}")
    A, B = shapes["A"], shapes["B"]
    fit = len(A) == len(B) > 1 and 0 not in A + B and (A[0] == B[1] or (len(A) > 2 and A[0] % B[1] == 0))
    if not fit:
        raise ValueError(
            f"{source} is damaged: the factors of {layer!r} do not fit: A {A} and B {B}, expected A [r, in, ...] and "
            "B [out, r, ...]"
        )


def write_directory(directory: str | os.PathLike[str], files: Files) -> None:
    """Write both files; each is there in full or not at all."""
    directory = location(directory)
    strings = {"format": "pt"}
    if files.metadata:
        strings[METADATA] = json.dumps(files.metadata, sort_keys=True)
    contiguous = {name: value.detach().to("cpu").contiguous() for name, value in files.tensors.items()}
    write_atomically(directory / WEIGHTS_NAME, _in_order(safetensors.torch.save(contiguous, strings)))
    write_atomically(directory / CONFIG_NAME, (json.dumps(files.config, indent=2, sort_keys=True) + "\n").encode())


def _in_order(content: bytes) -> bytes:
    """Return the same safetensors file with its metadata sorted: the library writes them in no order of its own."""
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[8 + size :]
