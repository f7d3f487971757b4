"""Open safetensors without reading them, and find the names that their tensors have in a model."""

import json
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor, nn

from lightning_lora.model.families import is_pretrained

INDEX_NAME = "model.safetensors.index.json"


@contextmanager
def open_slices(source: str) -> Iterator[dict[str, Any]]:
    """Open safetensors files and yield ``{key: slice}``; nothing is read before a slice is indexed.

    Raises:
        FileNotFoundError: there is no such file or directory, or no safetensors in it.
        ValueError: a file is no safetensors file, or two hold the same tensor.
    """
    with ExitStack() as stack:
        slices: dict[str, Any] = {}
        for path in _files(Path(source)):
            try:
                file = stack.enter_context(safe_open(path, framework="pt", device="cpu"))
            except Exception as error:  # safetensors has an exception of its own
                raise ValueError(f"{path} cannot be read as safetensors: {error}") from error
            found = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118  # not a mapping
            if twice := sorted(found.keys() & slices.keys()):
                raise ValueError(f"several files in {source} hold {twice[0]!r}; give one of them")
            slices |= found
        yield slices


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    index = path / INDEX_NAME
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        missing = [name for name in names if not (path / name).is_file()]
        if missing:
            raise FileNotFoundError(f"{index} names {missing[0]!r}, which is not there")
        return [path / name for name in names]
    files = [file for file in [path / "model.safetensors"] if file.is_file()] or sorted(path.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"no safetensors at {path}; give a .safetensors file or their directory")
    return files


@dataclass
class Fused:
    """Tensors of a file that transformers' own code makes into others.

    Attributes:
        name: of what is made, in the model.
        parts: ``(key in the file, pattern of the converter that it matches)``.
    """

    name: str
    converter: Any
    parts: list[tuple[str, str]] = field(default_factory=list)

    def tensors(self, root: nn.Module, slices: Mapping[str, Any]) -> dict[str, Tensor]:
        """Read the parts and return what they make, by name in the model."""
        for key, pattern in self.parts:
            self.converter.add_tensor(self.name, key, pattern, slices[key][:])
        made: Any = self.converter.convert(self.name, model=root, config=root.config)
        made = made[0] if isinstance(made, tuple) else made  # with its errors, from transformers 5.0
        return {target: value[0] if isinstance(value, list) else value for target, value in made.items()}


def names_in_model(
    root: nn.Module, keys: Collection[str], targets: Mapping[str, Any]
) -> tuple[dict[str, str], list[Fused]]:
    """Return for the keys of a file the names in the model: of what is copied as it is, and of what is converted.

    The names are the file's, unless they fit worse than what transformers' conversion rules make of them. A key may
    lack, or have in excess, the prefix of the body of a model with a head.
    """
    loading = sys.modules.get("transformers.core_model_loading")
    if not is_pretrained(root) or all(key in targets for key in keys):
        return {key: key for key in keys}, []
    renamings, converters = _rules(root)
    assert loading is not None
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    plain: dict[str, str] = {}
    fused: dict[str, Fused] = {}
    for key in sorted(keys, key=loading.dot_natural_key):
        name, pattern = loading.rename_source_key(key, renamings, converters, root.base_model_prefix, targets)
        if name not in targets and key in targets:
            name, pattern = key, None
        if pattern is None:
            plain[key] = name
        else:
            if name not in fused:
                fused[name] = Fused(name, deepcopy(by_pattern[pattern]))
            fused[name].parts.append((key, pattern))
    return plain, list(fused.values())


def _rules(root: nn.Module) -> tuple[list[Any], list[Any]]:
    """Return transformers' renamings and converters for a model."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    rules: Any = get_model_conversion_mapping(root)  # type: ignore[arg-type]  # a PreTrainedModel
    return (
        [rule for rule in rules if isinstance(rule, WeightRenaming)],
        [rule for rule in rules if isinstance(rule, WeightConverter)],
    )
