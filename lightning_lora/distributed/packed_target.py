"""Fill packed weights from disk: each rank reads the values of its own blocks and quantises them, or reads their bytes.

Values are read, quantised and dropped a few blocks at a time.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.layers.host import Hosted
from lightning_lora.layers.quantized import QuantizedModule
from lightning_lora.layers.quantized_state import ZERO_CODES, read_parts, scales_name
from lightning_lora.layers.split import SplitLinear
from lightning_lora.model.names import clean_name, joined
from lightning_lora.ops.four_bit import BLOCK, BYTES
from lightning_lora.ops.packed import Int8, PackedWeight, as_bytes
from lightning_lora.ops.sample_hash import runs_hash
from lightning_lora.ops.sharded import boxes, gathered_like, local_part

_CHUNK = 2**16  # values that are read at once


@dataclass(frozen=True)
class PackedTarget:
    """A packed weight of a model, of which this rank may hold a part."""

    module: QuantizedModule
    name: str

    @property
    def form(self) -> type[PackedWeight]:
        return type(self.module.quantized[self.name])

    @property
    def parts(self) -> Mapping[str, Tensor]:
        """What this rank holds."""
        return self.module.stored(self.name).tensors

    @property
    def cut(self) -> tuple[int, int] | None:
        """Where this rank's columns begin and end, if it has a part of every row (row-parallel layers)."""
        if not isinstance(self.module, SplitLinear) or self.module.tp_dim == 0:
            return None
        width = self.module.quantized[self.name].shape[1]
        rank = torch.distributed.get_rank(self.module.tp_group)
        return rank * width, (rank + 1) * width

    @property
    def empty(self) -> PackedWeight:
        """The form, shape and dtype of the whole weight."""
        return self.module.whole_form(self.name)

    @property
    def shape(self) -> torch.Size:
        """The shape of the whole parameter that was packed."""
        return self.empty.shape[::-1] if self.module.packs_transpose else self.empty.shape

    @property
    def blocks(self) -> tuple[int, int]:
        """Which blocks of the whole this rank holds: the first and the one behind the last."""
        [box] = boxes(self.parts["codes"])
        return box.offset[0], box.offset[0] + box.shape[0]


def packed_targets(root: nn.Module) -> dict[str, PackedTarget]:
    """Return the packed weights of a model, by the names that they had as parameters."""
    return {
        joined(clean_name(path), name): PackedTarget(module, name)
        for path, module in root.named_modules()
        if isinstance(module, QuantizedModule) and not isinstance(module, Hosted)
        for name in module.quantized
    }


@torch.no_grad()
def fill_from_values(target: PackedTarget, source: Any) -> tuple[bool, Tensor]:
    """Quantise the floating-point values of ``source``, of the shape that is packed, and store this rank's part.

    Called on all ranks that share the weight. With double quantisation they gather its scales: 1/16 byte a value.

    Args:
        source: what returns a slice of rows and columns when it is indexed, such as a tensor or a slice of a file.

    Returns:
        Whether all values that this rank has read are finite; and its addend to the :func:`sample_hash` of the weight.
    """
    form, shape, dtype, parts, cut = target.form, target.empty.shape, target.empty.dtype, target.parts, target.cut
    codes, scales, start = local_part(parts["codes"]), [], 0
    origin = torch.zeros((), dtype=torch.int64)
    for values, first, stride in _chunks(target, source):
        values = values.to(dtype)
        some_codes, some_scales = form.pack_blocks(values.reshape(-1), form.block_size(shape))
        if form is Int8 and cut is not None:  # it has read whole rows
            values, first, some_codes = values[:, slice(*cut)], first + cut[0], some_codes[:, slice(*cut)]
        origin += runs_hash(values, first, stride, shape, is_transposed=target.module.packs_transpose)
        codes[start : start + len(some_codes)].copy_(some_codes)
        scales.append(some_scales)
        start += len(some_codes)
    own = torch.cat(scales) if scales else torch.empty(0)
    whole = gathered_like(own, parts["scales"]) if form.whole_parts else own
    for part, tensor in form.pack_scales(whole).items():
        local_part(parts[part]).copy_(tensor if whole is own else _own(target, part, tensor))
    return bool(torch.isfinite(whole).all()), origin


def _own(target: PackedTarget, part: str, whole: Tensor) -> Tensor:
    """Return of a part of the whole weight what this rank holds."""
    if part in target.form.whole_parts:
        return whole
    if target.cut is None:
        first, stop = target.blocks
        return whole[first:stop]
    if target.form is Int8:
        return whole[:, slice(*target.cut)] if part == "codes" else whole
    begin, end = (column // BLOCK for column in target.cut)
    return whole.view(target.empty.shape[0], -1, whole.shape[1])[:, begin:end].reshape(-1, whole.shape[1])


def _chunks(target: PackedTarget, source: Any) -> Iterator[tuple[Tensor, int, int]]:
    """Yield values that this rank is to quantise, ``[runs, length]``, with the first's place and the next run's."""
    shape, block_size = target.empty.shape, target.form.block_size(target.empty.shape)
    columns = shape[-1]
    if target.cut is not None:
        # a row has one scale in 8 bits: it takes all of its values
        begin, end = (0, columns) if target.form is Int8 else target.cut
        step = max(1, _CHUNK // (end - begin))
        for row in range(0, shape[0], step):
            yield source[row : row + step, begin:end], row * columns + begin, columns
        return
    first, stop = (min(block * block_size, shape.numel()) for block in target.blocks)
    step = max(1, _CHUNK // block_size) * block_size
    for start in range(first, stop, step):
        end = min(start + step, stop)
        row = start // columns
        rows = _rows(source, shape, row, -(-end // columns)).reshape(-1)
        yield rows[start - row * columns : end - row * columns][None], start, end - start


def _rows(source: Any, shape: torch.Size, first: int, stop: int) -> Tensor:
    """Return rows of a weight, counted over all of its dimensions but the last."""
    if len(shape) == 2:
        rows: Tensor = source[first:stop]
        return rows
    pieces, row, per_matrix = [], first, shape[-2]
    while row < stop:  # a matrix after the other
        matrix, begin = divmod(row, per_matrix)
        end = min(per_matrix, begin + stop - row)
        pieces.append(source[matrix : matrix + 1, begin:end].reshape(end - begin, -1))
        row += end - begin
    return torch.cat(pieces)


@torch.no_grad()
def fill_from_packed(target: PackedTarget, entries: Mapping[str, Any], name: str) -> bool:
    """Store this rank's part of a weight that is packed on disk, as bitsandbytes writes it.

    Returns whether the scales that this rank has read are finite.

    Args:
        entries: the file's slices by their names in the model.
        name: of the weight.

    Raises:
        ValueError: the entries are of another form, block size, code or shape, or some are missing.
    """
    scales_key = scales_name(name) if target.form is Int8 else f"{name}.absmax"
    by_rows = (name, scales_key)
    state = {
        key: torch.empty(source.get_shape(), dtype=source[:1].dtype, device="meta") if key in by_rows else source[:]
        for key, source in entries.items()
    }
    described, parts = read_parts(target.empty, state, name), target.parts
    for part in target.form.whole_parts:
        parts[part].copy_(described[part])
    begin, end = target.blocks if target.cut is None else (0, described["codes"].shape[0])
    codes, scales = _blocks_on_disk(target, entries[name], begin, end), entries[scales_key][begin:end]
    scales = scales[:, None] if scales.dtype == torch.uint8 else as_bytes(scales.float())
    if target.cut is not None:
        codes, scales = _own(target, "codes", codes), _own(target, "scales", scales)
    local_part(parts["codes"]).copy_(codes)
    local_part(parts["scales"]).copy_(scales)
    return replace(target.empty, tensors={**described, "scales": scales}).is_finite()


def _blocks_on_disk(target: PackedTarget, source: Any, begin: int, end: int) -> Tensor:
    """Return the codes of some blocks, ``[blocks, bytes of a block]``."""
    if target.form is Int8:
        return _rows(source, target.empty.shape, begin, end).view(torch.uint8)
    size = source.get_shape()[0]
    held = source[min(begin * BYTES, size) : min(end * BYTES, size)].reshape(-1)
    return nn.functional.pad(held, (0, (end - begin) * BYTES - len(held)), value=ZERO_CODES).view(-1, BYTES)
