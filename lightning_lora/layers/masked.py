"""Mixtures while torch.compile traces: every adapter runs on all rows, and a mask keeps its own.

Which row is whose is then a tensor of the graph, so that another mixture needs no other graph. It costs each adapter's
products of rank r on all rows.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lora.layers.acting import Choice, Mixture
from lightning_lora.ops.linear_tensors import LinearTensors
from lightning_lora.ops.stored import stored_linear


def masked_linears(
    bases: Sequence[LinearTensors], adapters: dict[str, dict[int, Any]], choice: Choice, mixture: Mixture, x: Tensor
) -> list[Tensor]:
    """Return the outputs of layers that read one input, each with the terms of its adapters on their own rows.

    Args:
        bases: the tensors of each layer's own product.
        adapters: the layers that each adapter of the model has, by its name and by their places.
        x: ``[..., in_features]``.
    """
    rows = x.reshape(-1, x.shape[-1])
    outputs = [_product(rows, base) for base in bases]
    owners = _owners(mixture, rows)
    kept: list[list[Tensor]] = [[] for _ in bases]  # [T, r] of each adapter
    factors: list[list[Tensor]] = [[] for _ in bases]
    for number, (name, layers) in enumerate(adapters.items()):
        is_own, seeds = owners == number, choice.seeds[name]
        next_seed = seeds.next.clone()
        settings: dict[Any, Any] = {}  # of the layers that share one mask
        for place, layer in layers.items():
            key = layer.lora_scaling, layer.lora_dropout, layer.drops
            if key not in settings:
                alike = [o for o in layers.values() if (o.lora_scaling, o.lora_dropout, o.drops) == key]
                settings[key] = layer.scaled_dropout_of(alike)
            own, entering = settings[key], rows
            if own.seed is not None:
                entering = rows * own.mask(rows, rows.shape[1])[is_own.cumsum(0).sub(1).clamp(min=0)]
            h = F.linear(entering, layer.lora_A.to(rows.dtype))
            kept[place].append(h * (is_own.to(rows.dtype) * own.factor)[:, None])
            factors[place].append(layer.lora_B.to(rows.dtype))
        seeds.take_back(next_seed, mixture.present[number])
    for place, (hs, Bs) in enumerate(zip(kept, factors, strict=True)):
        if hs:
            outputs[place] = outputs[place] + F.linear(torch.cat(hs, 1), torch.cat(Bs, 1))
    return [y.view(*x.shape[:-1], y.shape[-1]) for y in outputs]


def run_masked(choice: Choice, mixture: Mixture, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Return what ``run`` gives with each adapter on all rows, and of these each row's own."""
    first = next(one for one in (*args, *kwargs.values()) if isinstance(one, Tensor))
    dim = 1 if mixture.is_packed and first.ndim > 1 and first.shape[0] == 1 else 0
    owners = mixture.owners.repeat_interleave(first.shape[dim] // mixture.owners.shape[0])
    chosen = choice.chosen
    total: Any = None
    for place, name in enumerate([None, *choice.names], start=-1):
        seeds = None if name is None else choice.seeds[name]
        next_seed = None if seeds is None else seeds.next.clone()
        choice.chosen, choice.is_apart = name, True
        found = run(*args, **kwargs)
        choice.chosen, choice.is_apart = chosen, False
        if seeds is not None and next_seed is not None:
            seeds.take_back(next_seed, mixture.present[place])
        is_own = owners == place
        total = (
            found if total is None else map_tensors(lambda new, old, m=is_own: _where(m, dim, new, old), found, total)
        )
    return total


def map_tensors(function: Callable[..., Tensor], *trees: Any) -> Any:
    """Return tuples, lists and dicts with what ``function`` gives for the tensors of all; else what the first holds."""
    first = trees[0]
    if isinstance(first, Tensor):
        return function(*trees)
    if isinstance(first, dict):
        return {key: map_tensors(function, *(tree[key] for tree in trees)) for key in first}
    if type(first) in (tuple, list):
        return type(first)(map_tensors(function, *ones) for ones in zip(*trees, strict=True))
    return first


def _where(is_own: Tensor, dim: int, new: Tensor, old: Tensor) -> Tensor:
    return torch.where(is_own.view(*(1,) * dim, -1, *(1,) * (new.ndim - dim - 1)), new, old)


def _product(rows: Tensor, base: LinearTensors) -> Tensor:
    if base.is_stored:
        return stored_linear(rows, base.weight, base.bias)
    return F.linear(rows, base.weight, base.bias)


def _owners(mixture: Mixture, rows: Tensor) -> Tensor:
    """Return the place of each row's adapter, ``[T]``."""
    owners = mixture.owners
    return owners.repeat_interleave(rows.shape[0] // owners.shape[0])
