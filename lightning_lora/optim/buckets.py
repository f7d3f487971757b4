"""The parameters of an optimizer, sorted into what one call of its kernel can step."""

from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import Tensor

from lightning_lora.ops.sharded import is_sharded
from lightning_lora.optim.flat import may_move, zeros_together
from lightning_lora.optim.step import MOMENTS, Bucket, Entry, is_regular, kind

State = MutableMapping[Any, Entry]


class Buckets:
    """The buckets of all groups of an optimizer, kept from step to step as long as nothing has changed.

    Args:
        flat: make parameters and gradients pieces of buffers where that is safe.
    """

    def __init__(self, flat: bool) -> None:
        self._flat = flat
        self._groups: list[tuple[list[Tensor], bool]] = []  # parameters, amsgrad
        self._waiting: list[list[int]] = []  # by group: positions of parameters that never had a gradient
        self._buckets: list[list[Bucket]] = []  # by group
        self._values: list[Tensor] = []  # of all entries of the state

    def of(
        self, groups: Sequence[Mapping[str, Any]], gradients: Sequence[Sequence[Tensor | None]], state: State
    ) -> list[list[Bucket]]:
        """Return the buckets, group by group. New parameters get their state."""
        if not self._are_current(groups, gradients, state):
            flat = [bucket.flat for bucket in chain(*self._buckets) if bucket.flat is not None]
            private = {one.address for one in flat if one.is_private()}
            self._groups, self._waiting, self._buckets = [], [], []
            for group, own in zip(groups, gradients, strict=True):
                self._add(group, own, state, private)
            self._values = [value for entry in state.values() for value in entry.values()]
        return self._buckets

    def forget(self) -> None:
        """Look at everything anew in the next step: groups or state are others."""
        self._groups = []

    def zero_gradients(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Zero the gradients of flat parameters in one fill each, and make all others ``None``."""
        flat = [bucket for bucket in chain(*self._buckets) if bucket.flat is not None] if self._have(groups) else []
        zeroed = {id(parameter) for bucket in flat for parameter in bucket.parameters}
        for group in groups:
            for parameter in group["params"]:
                if id(parameter) not in zeroed:
                    parameter.grad = None
        for bucket in flat:
            assert bucket.flat is not None
            bucket.flat.zero_gradients()

    def _have(self, groups: Sequence[Mapping[str, Any]]) -> bool:
        return len(groups) == len(self._groups) and all(
            _same(group["params"], members) for group, (members, _) in zip(groups, self._groups, strict=True)
        )

    def _are_current(
        self, groups: Sequence[Mapping[str, Any]], gradients: Sequence[Sequence[Tensor | None]], state: State
    ) -> bool:
        if not self._have(groups):
            return False
        if any(group["amsgrad"] != amsgrad for group, (_, amsgrad) in zip(groups, self._groups, strict=True)):
            return False
        if any(own[i] is not None for own, waiting in zip(gradients, self._waiting, strict=True) for i in waiting):
            return False
        # by identity, without a look into any tensor: those would come from memory one by one
        values = chain.from_iterable(map(dict.values, state.values()))
        return _same(values, self._values) and all(bucket.has_kept_parameters() for bucket in chain(*self._buckets))

    def _add(
        self, group: Mapping[str, Any], gradients: Sequence[Tensor | None], state: State, private: set[int]
    ) -> None:
        members, amsgrad = list(group["params"]), bool(group["amsgrad"])
        waiting: list[int] = []
        positions: dict[tuple[Any, ...], list[int]] = {}
        for i, (parameter, gradient) in enumerate(zip(members, gradients, strict=True)):
            if gradient is None and not state.get(parameter):
                waiting.append(i)
            else:
                is_flat = self._flat and may_move(parameter, private)
                positions.setdefault((*kind(parameter), is_sharded(parameter), is_flat), []).append(i)
        buckets = []
        for (*_, is_flat), indices in positions.items():
            own = [members[i] for i in indices]
            _start([parameter for parameter in own if not state.get(parameter)], state, amsgrad=amsgrad)
            names = MOMENTS[: 3 if amsgrad else 2]
            buckets.append(Bucket(indices, own, [state[parameter] for parameter in own], names, flat=is_flat))
        self._groups.append((members, amsgrad))
        self._waiting.append(waiting)
        self._buckets.append(buckets)


_END = (object(),)  # makes the longer of two differ


def _same(some: Iterable[Any], others: Iterable[Any]) -> bool:
    return all(map(is_, chain(some, _END), chain(others, _END)))


def _start(parameters: Sequence[Tensor], state: State, *, amsgrad: bool) -> None:
    """Give parameters of one dtype and device that have no state AdamW's, all zero."""
    regular = [parameter for parameter in parameters if is_regular(parameter)]
    for name in MOMENTS[: 3 if amsgrad else 2]:
        pieces = dict(zip(map(id, regular), zeros_together(regular)[1], strict=True))
        for parameter in parameters:
            zeros = pieces.get(id(parameter))
            entry = state.setdefault(parameter, {})
            entry.setdefault("step", torch.zeros((), dtype=torch.float32))
            entry[name] = torch.zeros_like(parameter, memory_format=torch.preserve_format) if zeros is None else zeros
