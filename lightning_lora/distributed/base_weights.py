"""Stream a base that was built on the meta device from safetensors: each rank reads only its slices."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn

from lightning_lora.compat.torch import non_persistent_buffers
from lightning_lora.compat.transformers import draw_weights
from lightning_lora.distributed.packed_base import PackedBase
from lightning_lora.distributed.packed_target import packed_targets
from lightning_lora.layers.trained import as_stored
from lightning_lora.model.base_files import names_in_model, open_slices
from lightning_lora.model.families import is_pretrained, name_or_path, resize_advice
from lightning_lora.model.names import clean_name, is_inside, joined, listed
from lightning_lora.model.spread import class_name, sharded_parameters
from lightning_lora.model.state import named_lora_layers, require_injection
from lightning_lora.ops.sharded import boxes, local_part, logical, split_over, write


def materialize(root: nn.Module, source: str | None, device: torch.device) -> None:
    """Give the tensors of ``root`` that are on the meta device memory on ``device``, and their values from disk.

    A rank reads of every tensor only the slice that it holds, so that none ever has the whole base in memory. Where
    transformers renamed or fused what a file holds, its own rules are followed, one fused tensor at a time. Buffers
    that no file holds, such as rotary frequencies, are computed anew by the module's own code. Packed weights are
    quantised from the floating-point values of a file, or read from one that holds them packed.

    Args:
        source: a safetensors file, or a directory with one or with ``model.safetensors.index.json``; ``None`` takes
            the directory that a transformers model says it came from. Given, it is also read into a base that is not
            on meta.

    Raises:
        ValueError: there are tensors on meta and nothing to fill them from, or the files lack some of them.
        FileNotFoundError: ``source`` is no such file or directory.
    """
    injection = require_injection(root)
    empty = {name for name, tensor in _base_tensors(root).items() if tensor.device.type == "meta"}
    empty |= {name for name, target in packed_targets(root).items() if target.parts["codes"].device.type == "meta"}
    if not empty and source in (None, injection.base_weights):
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
        filled, keys = _fill(root, slices), set(slices)
    _finish(root, (empty or {*_base_tensors(root), *packed_targets(root)}) - filled, source, keys)
    injection.base_weights = source


def _own_source(root: nn.Module) -> str | None:
    where = name_or_path(root)
    return where if where is not None and Path(where).is_dir() else None


def _base_tensors(root: nn.Module) -> dict[str, Tensor]:
    """Return parameters under all of their names, and buffers, but what packed weights are made of.

    Adapters have values already.
    """
    others = {id(p) for layer in named_lora_layers(root).values() for _, p in layer.named_adapter_tensors()}
    others |= {id(part) for target in packed_targets(root).values() for part in target.parts.values()}
    named = [*root.named_parameters(remove_duplicate=False), *root.named_buffers(remove_duplicate=False)]
    return {clean_name(name): tensor for name, tensor in named if id(tensor) not in others}


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
            _mark(module.get_buffer(buffer))
        if lost and (not _draw(root, name, module) or any(_is_marked(module.get_buffer(buffer)) for buffer in lost)):
            raise ValueError(
                f"{joined(name, lost[0])!r} is a buffer that no checkpoint holds (persistent=False), it is on the meta "
                f"device, and {class_name(module)} has no reset_parameters() that computes it: build the model's "
                "buffers on CPU, or make them persistent"
            )


def _mark(buffer: Tensor) -> None:
    """Fill a buffer with what no computation leaves behind; a bool has no such value."""
    if buffer.dtype != torch.bool:
        buffer.fill_(float("nan") if buffer.is_floating_point() else torch.iinfo(buffer.dtype).min)


def _is_marked(buffer: Tensor) -> bool:
    if buffer.dtype == torch.bool:
        return False
    wrong = buffer.isnan() if buffer.is_floating_point() else buffer == torch.iinfo(buffer.dtype).min
    return bool(wrong.any())


def _draw(root: nn.Module, name: str, module: nn.Module) -> bool:
    """Let a module compute or draw its own tensors; return whether it can."""
    path = clean_name(name)
    owners: dict[str, Any] = {clean_name(n): m for n, m in root.named_modules() if is_pretrained(m)}
    around = [owner for owner in owners if is_inside(path, owner)]
    with as_stored(module):
        if around:
            draw_weights(owners[max(around, key=len)], module)
            return True
        if callable(reset := getattr(module, "reset_parameters", None)):
            reset()
            return True
    return False


def _fill(root: nn.Module, slices: Mapping[str, Any]) -> set[str]:
    """Copy what the slices hold into ``root``; return what was filled, tied tensors under all of their names."""
    targets, packed = _base_tensors(root), PackedBase(packed_targets(root), slices)
    plain, fused = names_in_model(root, packed.weights, {**targets, **packed.targets})
    filled = {name for name in plain.values() if name in targets or name in packed.targets}
    for key, name in plain.items():
        if name in packed.targets:
            packed.fill(key, name)
        elif name in targets:
            packed.check_floats(key, name)
            _check_shape(root, targets[name], slices[key].get_shape(), name)
            _copy_slice(targets[name], slices[key])
    for one in fused:
        for key, _ in one.parts:
            packed.check_floats(key, one.name)
        for name, value in one.tensors(root, slices).items():
            if name in packed.targets:
                packed.quantize(value, value.shape, name)
            elif name in targets:
                _check_shape(root, targets[name], value.shape, name)
                write(targets[name], value.to(targets[name].dtype))
            filled |= {name} & (targets.keys() | packed.targets.keys())
    packed.finish()
    if unused := [key for key, name in plain.items() if name not in filled]:
        rank_zero_info(f"base_weights: {class_name(root)} has no place for {listed(unused, 3)}")
    done = {id(targets[name]) for name in filled if name in targets}
    return filled | {name for name, tensor in targets.items() if id(tensor) in done}


def _copy_slice(target: Tensor, source: Any) -> None:
    """Read this rank's part of one tensor from disk into its place."""
    part = local_part(target.detach())
    for box in boxes(target):
        if 0 not in box.shape:
            values = source[tuple(map(_range, box.offset, box.shape)) or ...]  # a scalar has no range
            part[tuple(map(_range, box.local_offset, box.shape))].copy_(values)


def _range(start: int, size: int) -> slice:
    return slice(start, start + size)


def _check_shape(root: nn.Module, target: Tensor, given: Sequence[int], name: str) -> None:
    expected, shape = tuple(logical(target).shape), tuple(given)
    if shape != expected:
        advice = resize_advice(root, name, shape, expected)
        raise ValueError(f"base_weights has {shape} for {name!r}, the model has {expected}{advice}")


def _finish(root: nn.Module, absent: set[str], source: str, keys: set[str]) -> None:
    """Draw new heads that are in no base checkpoint; raise ``ValueError`` for anything else that is missing."""
    tensors = _base_tensors(root)
    wanted = absent - {joined(clean_name(n), b) for n, m in root.named_modules() for b in non_persistent_buffers(m)}
    new = {name.rpartition(".")[0] for name in wanted if name in tensors and tensors[name].requires_grad}
    for path in sorted(new):
        module = root.get_submodule(path)
        if all(joined(path, name) in wanted for name, _ in module.named_parameters()) and _draw(root, path, module):
            wanted -= {name for name in wanted if name.startswith(f"{path}.")}
    if wanted:
        lacking = f"{len(wanted)} tensors of {class_name(root)}: {listed(sorted(wanted), 3)}"
        raise ValueError(f"{source} lacks {lacking}{_prefix_advice(wanted, keys)}")


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
