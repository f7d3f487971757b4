"""Stream a base that was built on the meta device from safetensors: each rank reads only its slices."""

import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_info
from safetensors import safe_open
from torch import Tensor, nn

from lightning_lora.compat.torch import non_persistent_buffers
from lightning_lora.compat.transformers import draw_weights
from lightning_lora.layers.trained import as_stored
from lightning_lora.model.families import is_pretrained, name_or_path, resize_advice
from lightning_lora.model.names import clean_name, joined, listed
from lightning_lora.model.spread import class_name, sharded_parameters
from lightning_lora.model.state import injection_of, named_lora_layers
from lightning_lora.ops.sharded import boxes, is_sharded, local_part, logical, split_over, write

INDEX_NAME = "model.safetensors.index.json"


def materialize(root: nn.Module, source: str | None, device: torch.device) -> None:
    """Give the tensors of ``root`` that are on the meta device memory on ``device``, and their values from disk.

    A rank reads of every tensor only the slice that it holds, so that none ever has the whole base in memory. Where
    transformers renamed or fused what a file holds, its own rules are followed, one fused tensor at a time. Buffers
    that no file holds, such as rotary frequencies, are computed anew by the module's own code.

    Args:
        source: a safetensors file, or a directory with one or with ``model.safetensors.index.json``; ``None`` takes
            the directory that a transformers model says it came from. Given, it is also read into a base that is not
            on meta.

    Raises:
        ValueError: there are tensors on meta and nothing to fill them from, or the files lack some of them.
        FileNotFoundError: ``source`` is no such file or directory.
    """
    adapters = {id(p) for layer in named_lora_layers(root).values() for _, p in layer.named_adapter_tensors()}
    empty = {
        name for name, tensor in _named_tensors(root) if tensor.device.type == "meta" and id(tensor) not in adapters
    }
    if not empty and (source is None or injection_of(root).base_weights == source):  # type: ignore[union-attr]
        return
    source = source or _own_source(root)
    if source is None:
        raise ValueError(
            f"{class_name(root)} is on the meta device ({min(empty)!r} and {len(empty) - 1} more) and nothing says "
            "where its weights are: give the strategy base_weights=, a safetensors file or a directory with them"
        )
    _allocate(root, device)
    _compute_buffers(root, empty)
    with open_slices(source) as slices:
        filled = _fill(root, slices, adapters)
        keys = set(slices)
    _finish(root, (empty or {name for name, _ in _named_tensors(root)}) - filled, adapters, source, keys)
    injection_of(root).base_weights = source  # type: ignore[union-attr]  # the root is adapted


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
                raise ValueError(f"base_weights: several files in {source} hold {twice[0]!r}; give one of them")
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
        raise FileNotFoundError(f"base_weights: no safetensors at {path}; give a .safetensors file or their directory")
    return files


def _own_source(root: nn.Module) -> str | None:
    where = name_or_path(root)
    return where if where is not None and Path(where).is_dir() else None


def _named_tensors(root: nn.Module) -> list[tuple[str, Tensor]]:
    """Return parameters under all of their names, and buffers."""
    named = [*root.named_parameters(remove_duplicate=False), *root.named_buffers(remove_duplicate=False)]
    return [(clean_name(name), tensor) for name, tensor in named]


def _allocate(root: nn.Module, device: torch.device) -> None:
    """Give what is on meta memory, keeping ties; what is real stays."""
    made: dict[int, nn.Parameter] = {}
    for module in root.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.device.type == "meta":
                if id(parameter) not in made:
                    empty = torch.empty_like(parameter, device=device)
                    made[id(parameter)] = nn.Parameter(empty, parameter.requires_grad)
                    if hasattr(parameter, "lora_split"):
                        split_over(made[id(parameter)], *parameter.lora_split)
                module._parameters[name] = made[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.device.type == "meta":
                module._buffers[name] = torch.empty_like(buffer, device=device)
    for module in root.modules():
        for record in sharded_parameters(module):
            record.reset_sharded_param()


@torch.no_grad()
def _compute_buffers(root: nn.Module, empty: set[str]) -> None:
    """Fill buffers that are in no file. Weights that the module's code draws on the way are overwritten from disk."""
    for name, module in root.named_modules():
        lost = [b for b in sorted(non_persistent_buffers(module)) if joined(clean_name(name), b) in empty]
        for buffer in lost:
            _mark(module._buffers[buffer])
        if lost and (not _draw(root, name, module) or any(_is_marked(module._buffers[buffer]) for buffer in lost)):
            raise ValueError(
                f"{joined(name, lost[0])!r} is a buffer that no checkpoint holds (persistent=False), it is on the meta "
                f"device, and {class_name(module)} has no reset_parameters() that computes it: build the model's "
                "buffers on CPU, or make them persistent"
            )


def _mark(buffer: Tensor | None) -> None:
    """Fill a buffer with what no computation leaves behind."""
    if buffer is not None and buffer.dtype != torch.bool:
        buffer.fill_(float("nan") if buffer.is_floating_point() else torch.iinfo(buffer.dtype).min)


def _is_marked(buffer: Tensor | None) -> bool:
    if buffer is None or buffer.dtype == torch.bool:
        return False
    wrong = buffer.isnan() if buffer.is_floating_point() else buffer == torch.iinfo(buffer.dtype).min
    return bool(wrong.any())


def _draw(root: nn.Module, name: str, module: nn.Module) -> bool:
    """Let a module compute or draw its own tensors; return whether it can."""
    path = clean_name(name)
    owners: dict[str, Any] = {clean_name(n): m for n, m in root.named_modules() if is_pretrained(m)}
    around = [n for n in owners if not n or path == n or path.startswith(f"{n}.")]
    with as_stored(module):
        if around:
            draw_weights(owners[max(around, key=len)], module)
            return True
        if callable(reset := getattr(module, "reset_parameters", None)):
            reset()
            return True
    return False


def _fill(root: nn.Module, slices: Mapping[str, Any], adapters: set[int]) -> set[str]:
    """Copy what the slices hold into ``root``; return what was filled, tied tensors under all of their names."""
    targets = {name: tensor for name, tensor in _named_tensors(root) if id(tensor) not in adapters}
    names = _names_in_model(root, slices, targets)
    filled: set[str] = set()
    fused: dict[str, tuple[Any, list[tuple[str, str]]]] = {}
    for key, (name, converter, pattern) in names.items():
        if converter is not None:
            fused.setdefault(name, (converter, []))[1].append((key, pattern))
        elif name in targets:
            _copy_slice(root, targets[name], slices[key], name)
            filled.add(name)
    for name, (converter, parts) in fused.items():
        for target, value in _converted(root, name, deepcopy(converter), parts, slices).items():
            if target in targets:
                _check_shape(root, targets[target], tuple(value.shape), target)
                write(targets[target], value.to(targets[target].dtype))
                filled.add(target)
    unused = [key for key, (name, converter, _) in names.items() if converter is None and name not in targets]
    if unused:
        some = listed(unused, 3)
        rank_zero_info(f"base_weights: {class_name(root)} has no place for {some}")
    done = {id(targets[name]) for name in filled}
    return filled | {name for name, tensor in targets.items() if id(tensor) in done}


def _copy_slice(root: nn.Module, target: Tensor, source: Any, name: str) -> None:
    """Read this rank's part of one tensor from disk into its place."""
    shape = tuple(source.get_shape())
    _check_shape(root, target, shape, name)
    with torch.no_grad():
        if not is_sharded(target):
            target.copy_(source[:] if shape else source[...])
            return
        part = local_part(target.detach())
        for box in boxes(target):
            if 0 not in box.shape:
                values = source[tuple(map(_range, box.offset, box.shape))]
                part[tuple(map(_range, box.local_offset, box.shape))].copy_(values)


def _range(start: int, size: int) -> slice:
    return slice(start, start + size)


def _check_shape(root: nn.Module, target: Tensor, shape: tuple[int, ...], name: str) -> None:
    expected = tuple(logical(target).shape)
    if shape != expected:
        advice = resize_advice(root, name, shape, expected)
        raise ValueError(f"base_weights has {shape} for {name!r}, the model has {expected}{advice}")


def _names_in_model(
    root: nn.Module, keys: Iterable[str], targets: Mapping[str, Tensor]
) -> dict[str, tuple[str, Any, str]]:
    """Return for every key its name in the model and, if several keys make one tensor, what converts them.

    The names are the file's, unless they fit worse than what transformers' conversion rules make of them. A key may
    lack, or have in excess, the prefix of the body of a model with a head.
    """
    loading = sys.modules.get("transformers.core_model_loading")
    plain: dict[str, tuple[str, Any, str]] = {key: (key, None, key) for key in keys}
    if not is_pretrained(root) or all(key in targets for key in plain):
        return plain
    renamings, converters = _rules(root)
    assert loading is not None
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    prefix: Any = root.base_model_prefix
    found: dict[str, tuple[str, Any, str]] = {}
    for key in sorted(plain, key=loading.dot_natural_key):
        name, pattern = loading.rename_source_key(key, renamings, converters, prefix, targets)
        if name not in targets and key in targets:
            name, pattern = key, None
        found[key] = (name, None if pattern is None else by_pattern[pattern], pattern or key)
    return found


def _rules(root: nn.Module) -> tuple[list[Any], list[Any]]:
    """Return transformers' renamings and converters for a model."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    rules: Any = get_model_conversion_mapping(root)  # type: ignore[arg-type]  # a PreTrainedModel
    return (
        [rule for rule in rules if isinstance(rule, WeightRenaming)],
        [rule for rule in rules if isinstance(rule, WeightConverter)],
    )


def _converted(
    root: nn.Module, name: str, converter: Any, parts: list[tuple[str, str]], slices: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Return the tensors that a transformers converter makes of several of a file's, by name in the model."""
    for key, pattern in parts:
        converter.add_tensor(name, key, pattern, slices[key][:])
    made: dict[str, Any] = converter.convert(name, model=root, config=root.config)
    return {target: value[0] if isinstance(value, list) else value for target, value in made.items()}


def _finish(root: nn.Module, absent: set[str], adapters: set[int], source: str, keys: set[str]) -> None:
    """Draw new heads that are in no base checkpoint; raise ``ValueError`` for anything else that is missing."""
    tensors = {name: tensor for name, tensor in _named_tensors(root) if id(tensor) not in adapters}
    ignored = {joined(clean_name(n), b) for n, m in root.named_modules() for b in non_persistent_buffers(m)}
    wanted = {name for name in absent if name in tensors} - ignored
    new = {name.rpartition(".")[0] for name in wanted if tensors[name].requires_grad}
    for path in sorted(new):
        module = root.get_submodule(path)
        if not any(joined(path, n) not in wanted for n, _ in module.named_parameters()) and _draw(root, path, module):
            wanted -= {name for name in wanted if name.startswith(f"{path}.")}
    if wanted:
        some = listed(sorted(wanted), 3)
        advice = _prefix_advice(wanted, keys)
        raise ValueError(f"{source} lacks {len(wanted)} tensors of {class_name(root)}: {some}{advice}")


def _prefix_advice(wanted: set[str], keys: set[str]) -> str:
    """Return what to do where the file's names differ from the model's by a prefix, and nothing else is wrong."""
    name = min(wanted)
    prefixes = [name[: -len(key)] for key in keys if name.endswith(f".{key}")]
    prefixes = [prefix for prefix in prefixes if all(other.removeprefix(prefix) in keys for other in wanted)]
    if prefixes:
        path = prefixes[0].removesuffix(".")
        return f"; it has them without {prefixes[0]!r}: adapt that module alone, by LoRACallback(module={path!r})"
    prefixes = [key[: -len(name)] for key in keys if key.endswith(f".{name}")]
    prefixes = [prefix for prefix in prefixes if all(f"{prefix}{other}" in keys for other in wanted)]
    return f"; it has them behind {prefixes[0]!r}: save the weights under the model's own names" if prefixes else ""
