"""One step of parameters that torch's fused AdamW kernel takes in one call."""

from collections.abc import Mapping, Sequence
from itertools import compress
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.ops.sharded import is_dtensor, is_sharded, local_part
from lightning_lora.optim.flat import FlatParameters, counted_together, packed, padded

MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
kind = attrgetter("device", "dtype")
_dtype = attrgetter("dtype")
_layout = attrgetter("layout")

Entry = dict[str, Tensor]


class Bucket:
    """Parameters of one group, dtype and device, with their state.

    Args:
        positions: where they are in their group.
        parameters: either all are spread over ranks, or none is.
        entries: their state.
        names: of the moments that they have.
        flat: make the parameters, their gradients and moments pieces of one buffer each.
    """

    def __init__(
        self,
        positions: list[int],
        parameters: list[nn.Parameter],
        entries: list[Entry],
        names: Sequence[str],
        *,
        flat: bool,
    ) -> None:
        self._positions = positions
        self.parameters = parameters
        self.is_spread = is_sharded(parameters[0])
        self._device, self._dtype = kind(parameters[0])
        for name in names:
            _check_kinds(parameters, [entry[name] for entry in entries])
        self.flat = FlatParameters(parameters) if flat else None
        self._flat_moments = [_pack(entries, name) for name in names] if flat else []
        self._moments = [[entry[name] for entry in entries] for name in names]
        self._padded_moments = [padded(one, parameters) for one in self._flat_moments]
        self._is_regular = all(is_regular(moment) for moments in self._moments for moment in moments)
        self._clock, self._steps = counted_together([entry["step"] for entry in entries], self._device)
        self._tick = torch.ones_like(self._clock)
        self._in_step: bool | None = None  # whether all counts are the same, once somebody asks
        for entry, step in zip(entries, self._steps, strict=True):
            entry["step"] = step

    def has_kept_parameters(self) -> bool:
        """Whether parameters are of the dtype that their state is of, and flat ones where they were put."""
        return set(map(_dtype, self.parameters)) == {self._dtype} and (
            self.flat is None or self.flat.holds_parameters()
        )

    def of_group(self, gradients: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """Return the bucket's gradients of the group's."""
        return gradients if len(self._positions) == len(gradients) else [gradients[i] for i in self._positions]

    def gather(self, gradients: Sequence[Tensor | None]) -> list[Tensor]:
        """Return what the bucket's gradients lie in, in as few tensors as can be; flat ones are brought there.

        Raises:
            RuntimeError: one is sparse.
        """
        if self.flat is not None and self.flat.holds_gradients(gradients):
            return [self.flat.gradients]
        there = [gradient for gradient in gradients if gradient is not None]
        if set(map(_layout, there)) - {torch.strided}:
            raise RuntimeError("LoRAAdamW does not step on sparse gradients: build the embedding with sparse=False")
        if self.flat is None:
            return there
        self.flat.gather(gradients)
        return [self.flat.gradients] if there else []

    def step(self, gradients: Sequence[Tensor | None], settings: Mapping[str, Any], scale: Tensor | None) -> None:
        """Step those parameters that have a gradient, in place.

        Args:
            gradients: of the bucket, gathered.
            settings: the group's.
            scale: what the gradients are divided by first, in place too; one float32 number.
        """
        is_full = self.flat is not None and self.flat.are_pieces(gradients)
        present = [] if is_full else [gradient is not None for gradient in gradients]
        if not is_full and not any(present):
            return
        if is_full or all(present):
            self._clock.add_(self._tick)
            parameters = self.parameters
        else:
            self._clock.add_(torch.tensor(present, dtype=torch.float32).to(self._device))
            self._in_step, parameters = None, list(compress(self.parameters, present))
        # the kernel leaves it out: a backward through what was stepped since its forward would pass for right. Before
        # it, as what was looked at until here is in the cache, and afterwards is not
        torch.autograd.graph.increment_version(parameters)
        if self.flat is None:
            self._step_list(parameters, list(compress(gradients, present)), present, settings, scale)
        else:
            self._step_flat(present, settings, scale)
            if scale is not None and not is_full:
                self.flat.give_back(gradients)

    def _step_flat(self, present: list[bool], settings: Mapping[str, Any], scale: Tensor | None) -> None:
        assert self.flat is not None
        rows = [self.flat.padded_values, self.flat.padded_gradients, *self._padded_moments]
        if not all(present):
            tensors = [list(compress(one, present)) for one in rows]
            _step(tensors, list(compress(self._steps, present)), settings, scale)
        elif self._are_in_step():
            flat = (self.flat.values, self.flat.gradients, *self._flat_moments)
            _step([[one] for one in flat], self._steps[:1], settings, scale)
        else:
            _step(rows, self._steps, settings, scale)

    def _step_list(
        self,
        parameters: list[nn.Parameter],
        gradients: list[Any],
        present: list[bool],
        settings: Mapping[str, Any],
        scale: Tensor | None,
    ) -> None:
        moments, steps = self._moments, self._steps
        if not all(present):
            moments, steps = [list(compress(one, present)) for one in moments], list(compress(steps, present))
        tensors: list[list[Any]] = [parameters, gradients, *moments]
        back: list[tuple[Tensor, Tensor]] = []
        if not (self._is_regular and _are_regular(parameters) and _are_regular(gradients, self._dtype)):
            tensors, back = _contiguous(tensors)
        _step(tensors, steps, settings, scale)
        for part, copy in back:
            part.copy_(copy)

    def _are_in_step(self) -> bool:
        if self._in_step is None:  # a look at the device waits for it
            self._in_step = bool((self._clock == self._clock[0]).all())
        return self._in_step


def _pack(entries: Sequence[Entry], name: str) -> Tensor:
    flat, pieces = packed([entry[name] for entry in entries])
    for entry, piece in zip(entries, pieces, strict=True):
        entry[name] = piece
    return flat


def is_regular(tensor: Tensor) -> bool:
    """Whether the kernel can take a tensor as it is."""
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


def _contiguous(tensors: Sequence[list[Any]]) -> tuple[list[list[Tensor]], list[tuple[Tensor, Tensor]]]:
    """Return what this rank holds of the tensors, as contiguous copies where they are strided.

    Returns:
        The parts, and those of them that are copies, each behind what it is a copy of.
    """
    copies: list[tuple[Tensor, Tensor]] = []
    columns: list[list[Tensor]] = [[] for _ in tensors]
    for row in zip(*tensors, strict=True):
        for column, one in zip(columns, row, strict=True):
            part = _part(one, like=row[0])
            column.append(part.contiguous())
            if column[-1] is not part:
                copies.append((part, column[-1]))
    return columns, copies


def _part(tensor: Any, like: Any) -> Tensor:
    """Return a tensor's part on this rank, real, in the order of ``like``'s; it shares the storage where it can."""
    if is_dtensor(tensor) and tensor.placements != like.placements:
        tensor = tensor.redistribute(placements=like.placements)
    part = local_part(tensor.detach())
    part = torch.view_as_real(part) if part.is_complex() else part
    return part if part.dtype == like.dtype or like.is_complex() else part.to(like.dtype)


def _check_kinds(parameters: Sequence[Tensor], moments: Sequence[Tensor]) -> None:
    for parameter, moment in zip(parameters, moments, strict=True):
        if kind(parameter) != kind(moment) or parameter.shape != moment.shape:
            raise ValueError(
                f"a parameter of shape {tuple(parameter.shape)} is {parameter.dtype} on {parameter.device}, its state "
                f"of shape {tuple(moment.shape)} is {moment.dtype} on {moment.device}: it was moved or cast after "
                "steps. Call optimizer.load_state_dict(optimizer.state_dict()), which takes the state along"
            )
