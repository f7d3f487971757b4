"""Quantise to 4 bits in blocks of 64, bit for bit as bitsandbytes does: NF4 and FP4, with plain or quantised scales.

Each block of 64 values is divided by the largest of its absolute values, its scale, and each quotient is rounded to one
of 16 codes (Dettmers et al. 2023, arXiv 2305.14314, sections 2 and 3). Two codes share a byte, the first value in the
high four bits. With double quantisation the scales are themselves quantised to 8 bits, in blocks of 256.
"""

import functools

import torch
from torch import Tensor

BLOCK = 64  # values that share a scale
SCALES_BLOCK = 256  # scales that share a scale of their own
BYTES = BLOCK // 2  # packed bytes of a block

# quantiles of a normal distribution with an exact zero (appendix E); the values of a 4-bit floating-point number
CODES = {
    "nf4": (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
    "fp4": tuple(sign * value / 12 for sign in (1, -1) for value in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)),
}  # fmt: skip
SMALLEST = 1e-38  # bitsandbytes divides by no scale below it


def num_blocks(numel: int) -> int:
    """Return how many blocks hold ``numel`` values; the last one may be short."""
    return -(-numel // BLOCK)


def quantize_4bit(values: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Return the packed codes ``[blocks, 32]``, uint8, and the scales ``[blocks]``, float32, of a tensor of any shape.

    A short last block is filled up with zeros. NaN and infinity give a scale that is not finite.

    Args:
        values: of a floating-point dtype; their blocks are those of the flattened tensor.
        kind: ``"nf4"`` or ``"fp4"``.
    """
    flat = values.detach().reshape(-1).float()
    tail = flat.numel() % BLOCK
    blocks = torch.nn.functional.pad(flat, (0, BLOCK - tail if tail else 0)).view(-1, BLOCK)
    scales = blocks.abs().amax(dim=1)
    quotients = blocks * scales.clamp_min(SMALLEST).reciprocal()[:, None]
    if tail:  # of which bitsandbytes divides the values, and bounds the scale that it stores
        scales[-1].clamp_(min=SMALLEST)
        quotients[-1] = blocks[-1] / scales[-1]
    midpoints, order = _midpoints(kind, values.device)
    codes = order[torch.bucketize(quotients.clamp_(-1, 1), midpoints, out_int32=True)]
    return (codes[:, ::2] << 4) | codes[:, 1::2], scales


def dense_4bit(packed: Tensor, scales: Tensor, kind: str, dtype: torch.dtype) -> Tensor:
    """Return the values ``[blocks, 64]`` that codes stand for, multiplied in float32 and rounded once to ``dtype``.

    Args:
        packed: ``[blocks, 32]``, uint8.
        scales: ``[blocks]``, float32.
    """
    # one lookup gives both values of a byte: a pair of float32 numbers is moved as one of 64 bits
    pairs = torch.index_select(_pairs(kind, packed.device), 0, packed.reshape(-1).to(torch.int32))
    dense: Tensor = pairs.view(torch.float32).view(-1, BLOCK).mul_(scales[:, None])
    return dense.to(dtype)


def quantize_scales(scales: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise scales to 8 bits (double quantisation), each to the nearest level.

    So do bitsandbytes' CUDA kernel and the one that it has for any device. Its CPU kernel looks a level up in a table
    of 65,536 entries and takes the next one for about two scales in a thousand.

    Args:
        scales: ``[blocks]``, float32.

    Returns:
        Their codes ``[blocks]``, uint8; the scales of each 256 of them ``[blocks / 256]`` and the mean that was taken
        off, ``[]``, both float32.
    """
    offset = scales.mean()
    centred = scales - offset
    tail = -len(centred) % SCALES_BLOCK
    blocks = torch.nn.functional.pad(centred, (0, tail)).view(-1, SCALES_BLOCK)
    nested = blocks.abs().amax(dim=1)
    # 256 equal scales leave zeros, and zero divided by zero: any code gives the mean, and bitsandbytes takes the first
    quotients = (blocks * nested.reciprocal()[:, None]).nan_to_num_(nan=-1.0).clamp_(-1, 1)
    levels = dynamic_levels(scales.device)
    below = torch.searchsorted(levels, quotients, right=True).sub_(1).clamp_(0, len(levels) - 1)
    above = (below + 1).clamp_max(len(levels) - 1)
    is_above = (levels[above] - quotients).abs() < (quotients - levels[below]).abs()
    codes = torch.where(is_above, above, below).to(torch.uint8)
    return codes.view(-1)[: len(scales)], nested, offset


def dense_scales(codes: Tensor, nested: Tensor, offset: Tensor, place: tuple[int, int, int] | None = None) -> Tensor:
    """Return the scales ``[blocks]``, float32, that :func:`quantize_scales` rounded.

    Args:
        codes: ``[blocks]``, uint8.
        nested: the scales of each 256 codes of the whole tensor.
        place: where ``codes`` lie in the whole tensor, if they are a part of it: the first of them, how many lie
            together, and how far it is from the first of those to the first of the next.
    """
    positions = torch.arange(len(codes), device=codes.device)
    if place is not None:
        first, together, stride = place
        if together < stride:
            positions = positions // together * stride + positions % together
        positions = positions + first
    levels: Tensor = dynamic_levels(codes.device)[codes.to(torch.int32)]
    return levels * nested[positions // SCALES_BLOCK] + offset


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def dynamic_levels(device: torch.device) -> Tensor:
    """Return the 256 levels of the signed dynamic type (Dettmers 2015, arXiv 1511.04561), sorted, ``[256]``, float32.

    Seven decades; the i-th has ``2^i`` levels of each sign, the middles of equal parts of 0.1 to 1.
    """
    return _dynamic_levels(device)


@functools.cache
def _dynamic_levels(device: torch.device) -> Tensor:
    levels = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32, device="cpu")
        middles = (10 ** (exponent - 6) * ((edges[:-1] + edges[1:]) / 2.0)).tolist()
        levels += [*middles, *(-middle for middle in middles)]
    return torch.tensor(sorted(levels), dtype=torch.float32, device=device)


@functools.cache
def code_values(kind: str, device: torch.device) -> Tensor:
    """Return the value of each code, ``[16]``, float32."""
    return torch.tensor(CODES[kind], dtype=torch.float32, device=device)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _pairs(kind: str, device: torch.device) -> Tensor:
    """Return the two values of each byte, ``[256]``: two float32 numbers seen as one float64."""
    return _pairs_of(kind, device)


@functools.cache
def _pairs_of(kind: str, device: torch.device) -> Tensor:
    values = code_values(kind, device)
    return torch.stack([values.repeat_interleave(16), values.repeat(16)], dim=1).view(torch.float64).view(-1)


@functools.cache
def _midpoints(kind: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the bounds between neighbouring values, ``[15]``, and the codes in the order of their values, ``[16]``."""
    values = code_values(kind, device)
    order = torch.argsort(values, stable=True)
    return (values[order[:-1]] + values[order[1:]]) / 2, order.to(torch.uint8)
