"""Repeat the rows of a batch, whatever kind of container it is."""

from typing import Any

from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor


def num_rows_of(batch: Any) -> int:
    """Return how many rows the first tensor of a batch has."""
    sizes: list[int] = []
    apply_to_collection(batch, Tensor, lambda one: sizes.append(one.shape[0]) if one.ndim else None)
    if not sizes:
        raise ValueError(f"a batch of type {type(batch).__name__} holds no tensor with rows to repeat for each adapter")
    return sizes[0]


def repeated(batch: Any, num_rows: int, times: int) -> Any:
    """Return a batch with all its rows ``times`` times, one copy behind the other."""
    batch = apply_to_collection(batch, list, lambda one: one * times if _is_by_row(one, num_rows) else one)
    return apply_to_collection(batch, Tensor, lambda one: one.repeat(times, *[1] * (one.ndim - 1)) if one.ndim else one)


def _is_by_row(values: list[Any], num_rows: int) -> bool:
    """Return True for a list with a value for each row, such as texts."""
    return len(values) == num_rows and not any(isinstance(value, Tensor) for value in values)
