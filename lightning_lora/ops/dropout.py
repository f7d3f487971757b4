"""Recompute dropout masks in backward instead of storing them: a mask is a hash of a seed and of positions."""

import torch
from torch import Tensor

from lightning_lora.compat.torch import has_transforms

# odd multipliers of 32-bit integer mixers (Wellons' "lowbias32" search) that fit a signed 32-bit integer
_MIX_1 = 0x21F0AAAD
_MIX_2 = 0x735A2D97
_GOLDEN = 0x1E3779B97F4A7C15


def dropped(seed: Tensor, num_rows: int, num_columns: int, dropout: float, device: torch.device) -> Tensor:
    """Return the dropout mask, True where an entry is dropped: ``[num_rows, num_columns]`` booleans.

    A hash of (seed, row, column) in integer tensor operations: the same on every call and every device, with nothing
    stored and no random state touched.

    Args:
        seed: scalar integer tensor; on another device than ``device`` it may only be a CPU one.
    """
    return _hashes(seed, num_rows, num_columns, device) < _threshold(dropout)


def keep_mask(
    seed: Tensor,
    like: Tensor,
    dropout: float,
    columns: tuple[int, int] | None = None,
    first_row: int = 0,
    *,
    num_columns: int | None = None,
) -> Tensor:
    """Return the complement of :func:`dropped` as zeros and ones of ``like``'s dtype, for its rows and device.

    CPU multiplies by them an order of magnitude faster than it makes and applies booleans.
    """
    size = like.shape[1] if num_columns is None else num_columns
    return _hashes(seed, like.shape[0], size, like.device, columns, first_row).ge_(_threshold(dropout)).to(like.dtype)


def keep_entries(x: Tensor, seed: Tensor, dropout: float) -> Tensor:
    """Return ``x`` with a share ``dropout`` of its entries set to zero and the others scaled up, by a hash of ``seed``.

    Args:
        x: ``[rows, ...]``, any number of dimensions.
    """
    rows = x.reshape(x.shape[0], -1) if x.ndim > 1 else x[None]
    kept = keep_mask(seed, rows, dropout)
    return (rows * kept / (1 - dropout)).view(x.shape)


def _threshold(dropout: float) -> int:
    """Return the signed 32-bit number that a share ``dropout`` of all such numbers lies below."""
    return round(dropout * 2**32) - 2**31


def _hashes(
    seed: Tensor,
    num_rows: int,
    num_columns: int,
    device: torch.device,
    columns: tuple[int, int] | None = None,
    first_row: int = 0,
) -> Tensor:
    """Return one hash per position: int32, ``[num_rows, num_columns]``."""
    first, total = columns or (0, num_columns)
    across, _, rows = _position_keys(seed, total + first_row + num_rows, device).split([total, first_row, num_rows])
    z: Tensor = rows[:, None] ^ across[None, first : first + num_columns]
    z = z.mul_(_MIX_1)
    z = z.bitwise_xor_(z >> 15)
    return z.mul_(_MIX_2)


def _position_keys(seed: Tensor, num_positions: int, device: torch.device) -> Tensor:
    """Return one well mixed 32-bit key per position: int32, ``[num_positions]``."""
    if not torch.compiler.is_compiling() and has_transforms():
        seed = seed.to(device)  # vmap may give one per sample, and only a scalar may be on another device
    z = torch.arange(1, num_positions + 1, dtype=torch.int64, device=device)
    z = (z + seed * 0x2545F4914F6CDD1D) * _GOLDEN
    z = (z ^ (z >> 32)) * 0x3F58476D1CE4E5B9
    z = (z ^ (z >> 29)) * 0x14D049BB133111EB
    return (z >> 31).to(torch.int32)
