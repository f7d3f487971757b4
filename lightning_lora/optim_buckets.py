"""What one call of the fused AdamW kernel steps: parameters of one group, dtype and device, with their state."""

from collections.abc import Mapping, MutableMapping, Sequence
from itertools import chain, compress
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.flat import together, zeros_together
from lightning_lora.sharded import is_dtensor, local_part

_kind = attrgetter("device", "dtype")
_dtype = attrgetter("dtype")

Entry = dict[str, Tensor]
State = MutableMapping[Any, Entry]


class Buckets:
    """The buckets of all groups of an optimizer, kept from step to step as long as nothing has changed."""

    def __init__(self) -> None:
        self._groups: list[tuple[list[Tensor], bool]] = []  # parameters, amsgrad
        self._waiting: list[list[int]] = []  # by group: positions of parameters that never had a gradient
        self._buckets: list[list[Bucket]] = []  # by group
        self._values: list[Tensor] = []  # of all entries of the state

    def of(
        self, groups: Sequence[Mapping[str, Any]], gradients: Sequence[Sequence[Tensor | None]], state: State
    ) -> list[list["Bucket"]]:
        """Return the buckets, group by group. New parameters get their state."""
        if not self._are_current(groups, gradients, state):
            self._groups, self._waiting, self._buckets = [], [], []
            for group, own in zip(groups, gradients, strict=True):
                self._add(group, own, state)
            self._values = [value for entry in state.values() for value in entry.values()]
        return self._buckets

    def _are_current(
        self, groups: Sequence[Mapping[str, Any]], gradients: Sequence[Sequence[Tensor | None]], state: State
    ) -> bool:
        if len(groups) != len(self._groups):
            return False
        for group, (members, amsgrad) in zip(groups, self._groups, strict=True):
            if group["amsgrad"] != amsgrad or not _same(group["params"], members):
                return False
        if any(own[i] is not None for own, waiting in zip(gradients, self._waiting, strict=True) for i in waiting):
            return False
        # by identity, without a look into any tensor: those would come from memory one by one
        return _same(list(chain.from_iterable(map(dict.values, state.values()))), self._values) and all(
            bucket.has_kept_dtype() for buckets in self._buckets for bucket in buckets
        )

    def _add(self, group: Mapping[str, Any], gradients: Sequence[Tensor | None], state: State) -> None:
        members, amsgrad = list(group["params"]), bool(group["amsgrad"])
        waiting: list[int] = []
        positions: dict[tuple[torch.device, torch.dtype], list[int]] = {}
        for i, (parameter, gradient) in enumerate(zip(members, gradients, strict=True)):
            if gradient is None and not state.get(parameter):
                waiting.append(i)
            else:
                positions.setdefault(_kind(parameter), []).append(i)
        for indices in positions.values():
            _start([members[i] for i in indices if not state.get(members[i])], state, amsgrad=amsgrad)
        self._groups.append((members, amsgrad))
        self._waiting.append(waiting)
        self._buckets.append(
            [
                Bucket(indices, [members[i] for i in indices], [state[members[i]] for i in indices], amsgrad=amsgrad)
                for indices in positions.values()
            ]
        )


def _same(some: Sequence[Any], others: Sequence[Any]) -> bool:
    return len(some) == len(others) and all(map(is_, some, others))


def _start(parameters: Sequence[Tensor], state: State, *, amsgrad: bool) -> None:
    """Give parameters of one dtype and device that have no state AdamW's, all zero."""
    regular = [parameter for parameter in parameters if _is_regular(parameter)]
    for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")[: 3 if amsgrad else 2]:
        pieces = dict(zip(map(id, regular), zeros_together(regular), strict=True))
        for parameter in parameters:
            zeros = pieces.get(id(parameter))
            entry = state.setdefault(parameter, {})
            entry.setdefault("step", torch.zeros((), dtype=torch.float32))
            entry[name] = torch.zeros_like(parameter, memory_format=torch.preserve_format) if zeros is None else zeros


class Bucket:
    """Parameters that are stepped together.

    Args:
        positions: where they are in their group.
        entries: their state.
    """

    def __init__(
        self, positions: list[int], parameters: list[nn.Parameter], entries: list[Entry], *, amsgrad: bool
    ) -> None:
        self._positions = positions
        self._parameters = parameters
        self._device, self._dtype = _kind(parameters[0])
        names = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")[: 3 if amsgrad else 2]
        self._moments = {name: [entry[name] for entry in entries] for name in names}
        for moments in self._moments.values():
            _check_kinds(parameters, moments)
        self._is_regular = all(_is_regular(moment) for moments in self._moments.values() for moment in moments)
        self._clock, self._steps = together([entry["step"] for entry in entries], self._device)
        for entry, step in zip(entries, self._steps, strict=True):
            entry["step"] = step

    def has_kept_dtype(self) -> bool:
        """Whether the parameters are of the dtype that their state is of."""
        return set(map(_dtype, self._parameters)) == {self._dtype}

    def step(self, gradients: Sequence[Tensor | None], settings: Mapping[str, Any], scale: Tensor | None) -> None:
        """Step those parameters that have a gradient, in place.

        Args:
            gradients: of all parameters of the group.
            settings: the group's.
            scale: what the gradients are divided by first, in place too; one float32 number.
        """
        if len(self._positions) < len(gradients):
            gradients = [gradients[i] for i in self._positions]
        present = [gradient is not None for gradient in gradients]
        lists: list[list[Any]] = [self._parameters, list(gradients), *self._moments.values(), self._steps]
        if all(present):
            self._clock.add_(1.0)
        elif any(present):
            self._clock.add_(torch.tensor(present, dtype=torch.float32).to(self._device))
            lists = [list(compress(tensors, present)) for tensors in lists]
        else:
            return
        *tensors, steps = lists
        if self._is_regular and _are_regular(tensors[0]) and _are_regular(tensors[1], self._dtype):
            _step(tensors, steps, settings, scale)
        else:
            _step_irregular(tensors, steps, settings, scale)
        # the kernel leaves it out: a backward through what was stepped since its forward would pass for right
        torch.autograd.graph.increment_version(tensors[0])


def _is_regular(tensor: Tensor) -> bool:
    return _are_regular([tensor])


def _are_regular(tensors: Sequence[Tensor], dtype: torch.dtype | None = None) -> bool:
    """Whether the kernel can take them as they are: it goes through memory in order, and looks at no strides."""
    if not set(map(type, tensors)) <= {Tensor, nn.Parameter}:
        return False
    dtypes = set(map(_dtype, tensors))
    if len(dtypes) > 1 or dtype not in (None, *dtypes) or any(one.is_complex for one in dtypes):
        return False
    return all(map(Tensor.is_contiguous, tensors))


def _step(
    tensors: Sequence[list[Tensor]], steps: list[Tensor], settings: Mapping[str, Any], scale: Tensor | None
) -> None:
    """Step in one call: parameters, gradients and moments, in this order."""
    parameters, gradients, exp_avgs, exp_avg_sqs, *maxima = tensors
    device, lr = parameters[0].device, settings["lr"]
    beta1, beta2 = settings["betas"]
    torch._fused_adamw_(
        parameters,
        gradients,
        exp_avgs,
        exp_avg_sqs,
        maxima[0] if maxima else [],
        steps,
        lr=lr.to(device) if isinstance(lr, Tensor) else lr,
        beta1=beta1,
        beta2=beta2,
        weight_decay=settings["weight_decay"],
        eps=settings["eps"],
        amsgrad=bool(maxima),
        maximize=settings["maximize"],
        grad_scale=None if scale is None else scale.to(device),
        found_inf=None,
    )


def _step_irregular(
    tensors: Sequence[list[Tensor]], steps: list[Tensor], settings: Mapping[str, Any], scale: Tensor | None
) -> None:
    """Step what this rank holds of the tensors, through contiguous copies where they are strided."""
    copies: list[tuple[Tensor, Tensor]] = []
    columns: list[list[Tensor]] = [[] for _ in tensors]
    for row in zip(*tensors, strict=True):
        if any(one.is_sparse for one in row):
            raise RuntimeError("LoRAAdamW does not step on sparse gradients: build the embedding with sparse=False")
        for column, one in zip(columns, row, strict=True):
            part = _part(one, like=row[0])
            column.append(part.contiguous())
            if column[-1] is not part:
                copies.append((part, column[-1]))
    _step(columns, steps, settings, scale)
    for part, copy in copies:
        part.copy_(copy)


def _part(tensor: Any, like: Any) -> Tensor:
    """Return a tensor's part on this rank, real, in the order of ``like``'s; it shares the storage where it can."""
    if is_dtensor(tensor) and tensor.placements != like.placements:
        tensor = tensor.redistribute(placements=like.placements)
    part = local_part(tensor.detach())
    part = torch.view_as_real(part) if part.is_complex() else part
    return part if part.dtype == like.dtype or like.is_complex() else part.to(like.dtype)


def _check_kinds(parameters: Sequence[Tensor], moments: Sequence[Tensor]) -> None:
    for parameter, moment in zip(parameters, moments, strict=True):
        if _kind(parameter) != _kind(moment) or parameter.shape != moment.shape:
            raise ValueError(
                f"a parameter of shape {tuple(parameter.shape)} is {parameter.dtype} on {parameter.device}, its state "
                f"of shape {tuple(moment.shape)} is {moment.dtype} on {moment.device}: it was moved or cast after "
                "steps. Call optimizer.load_state_dict(optimizer.state_dict()), which takes the state along"
            )
