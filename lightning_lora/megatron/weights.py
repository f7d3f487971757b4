"""``load_hf_weights``: fill a Megatron-core ``GPTModel`` from Hugging Face safetensors, each rank its own slices."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.layers.quantized import QuantizedModule
from lightning_lora.megatron.core import rank_and_size
from lightning_lora.megatron.table import HF_TABLE, READINGS, Row, Source, pattern, row_of, split_index
from lightning_lora.model.base_files import open_slices
from lightning_lora.model.spread import class_name


def load_hf_weights(model: nn.Module, path: str | Path, table: Sequence[Row] = HF_TABLE) -> None:
    """Copy a checkpoint's values into the parameters of a ``GPTModel``, in place, adapted or not.

    Called on all ranks, without a collective: a rank reads only the rows or columns that it holds. Everything is
    compared before the first copy. Adapters stay as they are.

    Args:
        model: a ``GPTModel``, or a module that holds one.
        path: a safetensors file, or a directory with one or with ``model.safetensors.index.json``.
        table: ``[*HF_TABLE, Row(...)]`` adds what another model has; later rows win.

    Raises:
        ValueError: the model is quantised, a parameter would stay unfilled, a tensor of the checkpoint unused, or a
            shape is another; nothing is copied then.
        FileNotFoundError: ``path`` is no such file or directory.

    Example::

        model = gpt_model("Qwen3-8B")
        load_hf_weights(model, "Qwen3-8B")
    """
    rank, size = rank_and_size()
    packed = next((name for name, module in model.named_modules() if isinstance(module, QuantizedModule)), None)
    if packed is not None:
        raise ValueError(
            f"{packed!r} is quantised, and the weights come too late: call load_hf_weights in configure_model, and "
            "give the strategy no base_weights="
        )
    with open_slices(str(path)) as slices:
        named = _named_as_in_the_table(slices, table)
        reads = _reads(model, named, table, size, str(path))
        _check_all_used(model, named, reads, str(path))
        _check_shapes(reads, size, str(path))
        with torch.no_grad():
            for read in reads:
                read.parameter.copy_(read.value(rank))


@dataclass(frozen=True)
class _Read:
    """One parameter, what it is made of, and how."""

    name: str
    parameter: Tensor
    sources: list[Source]
    shapes: list[list[int]]  # expected of the sources
    value: Callable[[int], Tensor]  # of a rank


def _reads(
    model: nn.Module, named: Mapping[str, tuple[str, Any]], table: Sequence[Row], size: int, path: str
) -> list[_Read]:
    wanted = {name: p for name, p in model.named_parameters() if not name.rpartition(".")[2].startswith("lora_")}
    rows = {name: found for name in wanted if (found := row_of(name, table, named)) is not None}
    if without := [name for name in wanted if name not in rows]:
        raise ValueError(
            f"table has no row for {_some(without)} of {class_name(model)}: give "
            "table=[*HF_TABLE, Row(megatron=..., hf=...)]"
        )
    reads, lacking = [], []
    for name, (row, keys) in rows.items():
        if missing := [key for key in keys if split_index(key)[0] not in named]:
            lacking += missing
            continue
        sources = [Source(named[k][0], index, named[k][1]) for k, index in map(split_index, keys)]
        owner = model.get_submodule(name.rpartition(".")[0])
        reading = READINGS[row.layout](row, wanted[name], sources, owner, size)
        reads.append(_Read(name, wanted[name], sources, *reading))
    if lacking:
        raise ValueError(f"{path} lacks {_some(lacking)}, which {class_name(model)} is made of")
    if empty := [read.name for read in reads if read.parameter.device.type == "meta"]:
        raise ValueError(f"{_some(empty)} of {class_name(model)} are on the meta device: nothing can be copied there")
    return reads


def _named_as_in_the_table(slices: Mapping[str, Any], table: Sequence[Row]) -> dict[str, tuple[str, Any]]:
    """Return the slices, and their keys in the file, by the table's names.

    All names of a file may stand behind a prefix, and those of a body alone lack ``model.``.
    """
    bodies = {key.split("[")[0] for row in table for key in row.hf if key.startswith("model.")}
    body = "|".join(pattern(key.removeprefix("model.")).pattern for key in sorted(bodies))
    matches = (re.fullmatch(rf"(?P<put>(?:.+?\.)??)(?P<cut>model\.)?(?:{body})", key) for key in slices)
    match = next((match for match in matches if match is not None), None)
    put, cut = ("", "") if match is None else (match["put"], "" if match["cut"] else "model.")
    named = {}
    for key, value in slices.items():
        name = key.removeprefix(put)
        named[cut + name if cut and re.fullmatch(body, name) else name] = (key, value)
    return named


def _check_all_used(model: nn.Module, named: Mapping[str, tuple[str, Any]], reads: Iterable[_Read], path: str) -> None:
    used = Counter(source.key for read in reads for source in read.sources)
    tied = any(getattr(module, "share_embeddings_and_output_weights", False) for module in model.modules())
    left = [
        key
        for name, (key, _) in named.items()
        if key not in used and not name.endswith("rotary_emb.inv_freq") and not (tied and name == "lm_head.weight")
    ]
    if left:
        raise ValueError(
            f"{path} holds {_some(left)}, for which {class_name(model)} has no place: it is another model's, or give "
            "table=[*HF_TABLE, Row(megatron=..., hf=...)]"
        )


def _check_shapes(reads: Iterable[_Read], size: int, path: str) -> None:
    wrong = []
    taken: dict[str, set[int]] = {}
    stacks = {}
    for read in reads:
        for source, expected in zip(read.sources, read.shapes, strict=True):
            if source.index is not None:
                taken.setdefault(source.key, set()).add(source.index)
                stacks[source.key] = source.slices.get_shape()[0]
            if source.shape != expected:
                wrong.append(f"{source.key!r} is {source.shape}, and {read.name!r} takes {expected}")
    for key, length in stacks.items():
        if taken[key] != set(range(length)):
            wrong.append(f"{key!r} holds {length} experts, and the model has {len(taken[key])}")
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(f"{path} does not fit (tensor_model_parallel_size={size}): {'; '.join(wrong[:3])}{more}")


def _some(names: Sequence[str]) -> str:
    """Return the first few of many names, with their number."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{len(names)} tensors: " * (len(names) > 1) + ", ".join(map(repr, names[:3])) + more
