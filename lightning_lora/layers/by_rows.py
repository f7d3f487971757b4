"""Run code on the rows of each adapter of a mixture apart, and put the outputs together."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_lora.layers.acting import Choice, Mixture, Part
from lightning_lora.layers.masked import map_tensors, run_masked


def run_by_rows(
    choice: Choice, mixture: Mixture, run: Callable[..., Any], args: Any, kwargs: Any, row_dim: int = 0
) -> Any:
    """Call ``run`` for each part of a mixture with its rows of all tensors, while its adapter alone acts.

    Args:
        row_dim: the dimension of the tensors that rows lie along.

    Raises:
        ValueError: the tensors have other rows than the mixture, or not all the same.
    """
    if torch.compiler.is_compiling():
        return run_masked(choice, mixture, run, args, kwargs)
    first = _first_tensor(args, kwargs)
    if first is None:
        raise ValueError("a layer got no tensor whose rows could be told apart by their adapters")
    shape = _leading(first, mixture, row_dim)
    parts, dim = mixture.parts(shape[row_dim:], first.device), len(shape) - 1
    outputs = []
    for part in parts:
        own_args, own_kwargs = map_tensors(lambda one, part=part: _take(one, part, shape), (args, kwargs))
        with choice.only(part.name):
            outputs.append(run(*own_args, **own_kwargs))
    return map_tensors(lambda *ones: _join(ones, parts, dim), *outputs)


def has_rows(mixture: Mixture, args: Any, kwargs: Any) -> bool:
    """Return True if all tensors have the rows of a mixture."""
    first = _first_tensor(args, kwargs)
    if first is None or first.ndim == 0:
        return False
    shape, rest = _leading(first, mixture), (one for one in (*args, *kwargs.values()) if isinstance(one, Tensor))
    return mixture.fits(shape) and all(one.shape[: len(shape)] == shape for one in rest)


def _first_tensor(args: Any, kwargs: Any) -> Tensor | None:
    return next((one for one in (*args, *kwargs.values()) if isinstance(one, Tensor)), None)


def _leading(first: Tensor, mixture: Mixture, row_dim: int = 0) -> torch.Size:
    """Return the leading dimensions of a tensor, up to the one that is told apart: of packed rows in a batch of one it
    is the second.
    """
    if row_dim:
        return first.shape[: row_dim + 1]
    return first.shape[: 2 if mixture.is_packed and first.ndim > 1 and first.shape[0] == 1 else 1]


def _take(one: Tensor, part: Part, shape: torch.Size) -> Tensor:
    if one.shape[: len(shape)] != shape:
        raise ValueError(
            f"a layer got tensors with {list(shape)} and {list(one.shape)} as leading dimensions, which cannot be told "
            "apart by rows: run its adapters one at a time"
        )
    return part.take(one, len(shape) - 1)


def _join(outputs: Sequence[Tensor], parts: Sequence[Part], dim: int) -> Tensor:
    """Return the outputs for the rows of all parts in the order of the rows; what is no output of rows as it is."""
    if len(parts) == 1 or all(one is outputs[0] for one in outputs):
        return outputs[0]
    total = torch.cat(list(outputs), dim)
    if all(isinstance(part.rows, slice) for part in parts):
        return total  # in order: each has one run
    order = torch.cat([part.indices(total.device) for part in parts])
    return total.index_select(dim, order.argsort())
