"""A weight of which the values are packed in 4 or 8 bits, made dense each time that it is used.

All parts of a packed weight are bytes, so that no cast of a module (``half()``, a mixed-precision policy) rounds a
scale.
The first dimension of the codes and of the scales counts the same blocks. So a slice of both is a packed weight, too,
and shards of FSDP2 end on block borders.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from lightning_lora.ops.four_bit import (
    BLOCK,
    BYTES,
    SCALES_BLOCK,
    dense_4bit,
    dense_scales,
    num_blocks,
    quantize_4bit,
    quantize_scales,
)
from lightning_lora.ops.stored import copy_after


@dataclass(frozen=True)
class PackedWeight:
    """Codes and scales of one weight.

    Attributes:
        tensors: the parts by name, all of them bytes: ``codes`` and ``scales``, whose first dimension counts blocks,
            and what belongs to the whole weight.
        shape: of the weight.
        dtype: that the weight had.
        place: of a part of a weight, where its blocks lie in the whole: the first of them, how many lie together, and
            how far it is from the first of those to the first of the next.
    """

    tensors: Mapping[str, Tensor]
    shape: torch.Size
    dtype: torch.dtype
    place: tuple[int, int, int] | None = None

    kind: ClassVar[str]  # the word of ``quantize=``
    whole_parts: ClassVar[tuple[str, ...]] = ()  # names of the parts that belong to the whole weight
    code_dtype: ClassVar[torch.dtype] = torch.uint8  # of the numbers that the codes are

    @property
    def device(self) -> torch.device:
        """The device of the codes."""
        return self.tensors["codes"].device

    @classmethod
    def quantize(cls, weight: Tensor) -> Self:
        """Return a weight of a floating-point dtype packed."""
        return cls(cls.pack(weight.detach()), weight.shape, weight.dtype)

    @classmethod
    def pack(cls, weight: Tensor) -> dict[str, Tensor]:
        """Return the parts of a weight."""
        size = cls.block_size(weight.shape)
        # a stack of matrices one by one: each takes some times its size while it is packed
        parts = weight.unbind() if weight.ndim == 3 and weight.shape[1:].numel() % size == 0 else (weight,)
        codes, scales = zip(*(cls.pack_blocks(part, size) for part in parts), strict=True)
        return {"codes": torch.cat(codes), **cls.pack_scales(torch.cat(scales))}

    @classmethod
    def block_size(cls, shape: torch.Size) -> int:
        """Return how many consecutive values of a weight of ``shape`` share a scale."""
        raise NotImplementedError

    @classmethod
    def pack_blocks(cls, values: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
        """Return the codes and the scales ``[blocks]``, float32, of whole blocks of values, in a tensor of any shape.

        Only the last block of a weight may be short.
        """
        raise NotImplementedError

    @classmethod
    def pack_scales(cls, scales: Tensor) -> dict[str, Tensor]:
        """Return the parts that hold the scales, ``[blocks]``: of the whole weight if there are ``whole_parts``."""
        return {"scales": as_bytes(scales)}

    @classmethod
    def sizes(cls, shape: torch.Size) -> dict[str, tuple[int, ...]]:
        """Return the shape of every part of a weight of ``shape``."""
        raise NotImplementedError

    def dense(self, dtype: torch.dtype) -> Tensor:
        """Return the values in ``dtype``, computed in float32 and rounded once."""
        raise NotImplementedError

    def after(self, grad: Tensor) -> Self:
        """Return a copy that torch.compile cannot make before ``grad``."""
        return replace(self, tensors={name: copy_after(part, grad) for name, part in self.tensors.items()})

    def is_finite(self) -> bool:
        """Return False if the weight held NaN or infinity, which a scale keeps."""
        return bool(torch.isfinite(floats(self.tensors["scales"])).all())

    def to(self, device: torch.device) -> Self:
        """Return the packed weight on another device."""
        return replace(self, tensors={name: part.to(device) for name, part in self.tensors.items()})


class NF4(PackedWeight):
    """4-bit NormalFloat in blocks of 64: ``codes [blocks, 32]``, ``scales [blocks, 4]``; 4.5 bits a value."""

    kind = "nf4"

    @classmethod
    def block_size(cls, shape: torch.Size) -> int:
        return BLOCK

    @classmethod
    def pack_blocks(cls, values: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
        return quantize_4bit(values, "nf4")

    @classmethod
    def sizes(cls, shape: torch.Size) -> dict[str, tuple[int, ...]]:
        blocks = num_blocks(shape.numel())
        return {"codes": (blocks, BYTES), "scales": (blocks, 4)}

    def block_scales(self) -> Tensor:
        """Return the scale of every block, ``[blocks]``, float32."""
        return floats(self.tensors["scales"])

    def dense(self, dtype: torch.dtype) -> Tensor:
        blocks = dense_4bit(self.tensors["codes"], self.block_scales(), "nf4", dtype)
        return blocks.view(-1)[: self.shape.numel()].view(self.shape)


class NF4Double(NF4):
    """NF4 with double quantisation: ``scales [blocks, 1]``, ``nested [blocks / 256, 4]``, ``offset [4]``; 4.13 bits."""

    kind = "nf4-dq"
    whole_parts = ("nested", "offset")

    @classmethod
    def pack_scales(cls, scales: Tensor) -> dict[str, Tensor]:
        codes, nested, offset = quantize_scales(scales)
        return {"scales": codes[:, None], "nested": as_bytes(nested), "offset": as_bytes(offset[None])[0]}

    @classmethod
    def sizes(cls, shape: torch.Size) -> dict[str, tuple[int, ...]]:
        blocks = num_blocks(shape.numel())
        return {
            "codes": (blocks, BYTES),
            "scales": (blocks, 1),
            "nested": (-(-blocks // SCALES_BLOCK), 4),
            "offset": (4,),
        }

    def block_scales(self) -> Tensor:
        nested, offset = floats(self.tensors["nested"]), floats(self.tensors["offset"][None])
        return dense_scales(self.tensors["scales"].view(-1), nested, offset, self.place)

    def is_finite(self) -> bool:
        numbers = torch.cat([self.tensors["nested"], self.tensors["offset"][None]])
        return bool(torch.isfinite(floats(numbers)).all())


class Int8(PackedWeight):
    """8-bit integers with a scale for every row: ``codes [rows, columns]``, ``scales [rows, 4]`` (LLM.int8's weights).

    A value is ``code * scale / 127``; the scale is the largest absolute value of the row (Dettmers et al. 2022,
    arXiv 2208.07339, section 2).
    """

    kind = "int8"
    code_dtype = torch.int8

    @classmethod
    def block_size(cls, shape: torch.Size) -> int:
        return shape[-1]

    @classmethod
    def pack_blocks(cls, values: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
        rows = values.reshape(-1, block_size).float()
        scales = rows.abs().amax(dim=1)
        codes = torch.round(rows * (127.0 / scales.clamp_min(torch.finfo(torch.float32).tiny))[:, None])
        return codes.to(torch.int8).view(torch.uint8), scales

    @classmethod
    def sizes(cls, shape: torch.Size) -> dict[str, tuple[int, ...]]:
        rows = shape[:-1].numel()
        return {"codes": (rows, shape[-1]), "scales": (rows, 4)}

    def dense(self, dtype: torch.dtype) -> Tensor:
        scales = floats(self.tensors["scales"]) / 127.0
        dense = self.tensors["codes"].view(torch.int8).float().mul_(scales[:, None])
        return dense.to(dtype).view(self.shape)


FORMS: dict[str, type[PackedWeight]] = {form.kind: form for form in (NF4, NF4Double, Int8)}


def as_bytes(values: Tensor) -> Tensor:
    """Return float32 numbers ``[n]`` as bytes ``[n, 4]`` in the same memory."""
    return values.contiguous().view(torch.uint8).view(-1, 4)


def floats(parts: Tensor) -> Tensor:
    """Return the numbers ``[n]``, float32, of which :func:`as_bytes` returned the bytes."""
    return parts.contiguous().view(torch.float32).view(-1)
