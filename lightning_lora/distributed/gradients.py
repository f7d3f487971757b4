"""Reduce gradients of replicated tensors in one all-reduce per step, before anyone reads them."""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_lora.compat.torch import foreach_copy_, foreach_div_
from lightning_lora.distributed.presence import Presence
from lightning_lora.distributed.replication import drifted
from lightning_lora.model.names import listed
from lightning_lora.ops.guarded import PartOfGradient, UnreducedGradient, bare, guard
from lightning_lora.ops.sharded import is_sharded, shard_group

# a step that ranks take differently shows at the next reduction
_CHECKED_REDUCTIONS = 5


class GradientReducer:
    """Averages the gradients of tensors that every rank of a group holds alike: whole ones, or the same parts.

    All of them go through one buffer of a fixed layout, with one presence flag per tensor: a gradient that is absent on
    every rank stays ``None``, one that is absent on some counts as zero there. To average what is average already
    changes nothing, so a second backward before the step reduces only what it added. A backward that the strategy does
    not run itself is noticed too, and reduced before the step. Until then its gradients are guarded, and those of parts
    are until the step: see :class:`~lightning_lora.ops.guarded.GuardedGradient`.

    Args:
        parameters: those of them that train and belong here are taken, in this order.
        group: the ranks that hold the same tensors; ``None`` is all.
        ranks_of: by how much a tensor's sum over the group is divided, if not by the group's size: where ranks hold
            addends of one gradient, by less.
        parts: take the parameters that each rank has a part of, and not those that are whole.
        names: of the parameters by identity, for errors.
        owners: the named adapter of each parameter, by identity: it is averaged over the ranks that had rows of it.

    Attributes:
        is_blocked: whether gradients accumulate on each rank for now.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter] = (),
        group: Any = None,
        *,
        ranks_of: Callable[[Tensor], int] | None = None,
        parts: bool = False,
        names: Mapping[int, str] | None = None,
        owners: Mapping[int, str] | None = None,
    ) -> None:
        self._group = group
        self._size = torch.distributed.get_world_size(group) if torch.distributed.is_initialized() else 1
        self._parts = parts
        self._kind: type[Tensor] = Tensor  # of gradients that are averaged
        self._names = names or {}
        self._owners = owners or {}
        self._ranks_of = ranks_of
        self._unchecked = _CHECKED_REDUCTIONS
        self._is_reduced = False
        self._parameters: list[nn.Parameter] = []
        self._known: set[int] = set()
        self.is_blocked = False
        self._hooks: list[Any] = []
        self.add(parameters)
        self._pending = False

    def add(self, parameters: Iterable[nn.Parameter]) -> None:
        """Take in those of further parameters that train and belong here, in this order, the same on all ranks."""
        for parameter in parameters:
            is_new = parameter.requires_grad and id(parameter) not in self._known
            if is_new and is_sharded(parameter) is self._parts:
                if self._parts and torch.distributed.get_world_size(shard_group([parameter])) > 1:
                    self._kind = PartOfGradient
                self._known.add(id(parameter))
                self._parameters.append(parameter)
                self._hooks.append(parameter.register_post_accumulate_grad_hook(self._note))
                if self._ranks_of is not None:  # also before a backward that the strategy does not run itself
                    self._hooks.append(parameter.register_hook(lambda _: self.before_backward()))
                self._pending = True  # it may have a gradient that was not reduced

    def _note(self, parameter: Tensor) -> None:
        self._pending = True
        guard([parameter], self._kind if self.is_blocked or self._size == 1 else UnreducedGradient)

    def release(self) -> None:
        """Watch the parameters no more."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Let gradients accumulate on each rank; the first backward outside the block reduces them."""
        former, self.is_blocked = self.is_blocked, True
        try:
            yield
        finally:
            self.is_blocked = former

    @torch.no_grad()
    def before_backward(self) -> None:
        """Turn gradients that were reduced already into addends again, so that the next reduction keeps them."""
        if self._ranks_of is None or not self._is_reduced:
            return
        self._is_reduced = False
        for parameter in self._parameters:
            if parameter.grad is not None and self._ranks_of(parameter) != self._size:
                parameter.grad.mul_(self._ranks_of(parameter) / self._size)

    def after_backward(self) -> None:
        """Reduce at once, or after the accumulation. Called on all ranks after every backward."""
        self._pending = True
        if not self.is_blocked:
            self.reduce()

    def before_step(self) -> None:
        """Reduce what a step would otherwise take unreduced."""
        if self._pending:
            self.reduce()

    @torch.no_grad()
    def reduce(self) -> None:
        """Average all gradients over the group, in one all-reduce of 4 bytes an element. Called on all ranks.

        Raises:
            ValueError: at one of the first steps, the parameters are no longer equal on all ranks.
        """
        self._pending, self._is_reduced = False, True
        if self._parameters and self._size > 1:
            if self._unchecked > 0:
                self._unchecked -= 1
                self.check_equal()
            self._average()
        guard(self._parameters, self._kind)

    def check_equal(self) -> None:
        """Raise ``ValueError`` if the parameters are not equal on all ranks of the group. Called on all of them."""
        drift = drifted(self._parameters, self._group) if self._size > 1 and torch.distributed.is_initialized() else []
        if drift:
            raise ValueError(_drift_error({self._names.get(id(parameter), "?"): by for parameter, by in drift}))

    def _average(self) -> None:
        parameters, present = self._parameters, [parameter.grad is not None for parameter in self._parameters]
        dtype = functools.reduce(torch.promote_types, (p.dtype for p in parameters), torch.float32)
        presence = Presence(parameters, present, self._owners)
        # flags first, so that the gradients' place does not depend on what is absent
        flags = torch.tensor(presence.flags, dtype=dtype).to(parameters[0].device, non_blocking=True)
        flat = torch.cat([flags, *(_flat_gradient(parameter, dtype) for parameter in parameters)])
        flags, *pieces = flat.split([len(flags), *(parameter.numel() for parameter in parameters)])
        if self._ranks_of is None:
            flat[len(flags) :].div_(self._size)
        else:
            sizes = [self._ranks_of(parameter) for parameter in parameters]
            foreach_div_(pieces, [float(ranks) for ranks in sizes])
        torch.distributed.all_reduce(flat, group=self._group)
        presence.average_over_ranks_with_rows(pieces, flags, self._size)
        if not all(present):  # a look at the flags waits for the device: only a rank that lacks some needs it
            present = [bool(flag) for flag in flags.tolist()[: len(parameters)]]
        gradients, averages = [], []
        for parameter, piece, is_there in zip(parameters, pieces, present, strict=True):
            if is_there:
                parameter.grad = torch.empty_like(parameter) if parameter.grad is None else parameter.grad
                gradients.append(bare(parameter.grad))
                averages.append(piece.view_as(parameter))
        if gradients:  # a backward may reach none of them
            foreach_copy_(gradients, averages)


def _flat_gradient(parameter: nn.Parameter, dtype: torch.dtype) -> Tensor:
    if parameter.grad is None:
        return torch.zeros(parameter.numel(), dtype=dtype, device=parameter.device)
    return bare(parameter.grad).reshape(-1).to(dtype)


def _drift_error(drift: Mapping[str, float]) -> str:
    some = listed(list(drift), 3)
    return (
        f"the ranks train different adapters: {some} should be equal on all ranks and differ by up to "
        f"{max(drift.values()):.1e}. Something between backward and step changed gradients or parameters "
        "differently on each rank: clipping or scaling by a norm that each rank took of its own part, random noise, "
        "or a step on some ranks alone. Clip with Trainer(gradient_clip_val=...), self.clip_gradients(...) or "
        "fabric.clip_gradients(...), and do everything else alike on all ranks. Every checkpoint that was written "
        "passed this check"
    )


def watch_steps(optimizer: Optimizer, before_step: Callable[..., None]) -> None:
    """Call ``before_step(optimizer, reduces=...)`` before every step, and let the step read gradients of parts.

    ``reduces`` is whether the gradients are there: a step with a closure computes them only then, and the closure's
    backward reduces them.
    """

    lifted: list[Tensor] = []

    def lift() -> None:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        lifted.extend(parameter for parameter in parameters if isinstance(parameter.grad, PartOfGradient))
        guard(lifted, Tensor)

    def after(*_: Any) -> None:
        guard(lifted, PartOfGradient)  # they stay until zero_grad, and may be read until then
        lifted.clear()

    def before(_: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        closure = args[1] if len(args) > 1 else kwargs.get("closure")  # args[0] is the optimizer
        before_step(optimizer, reduces=closure is None)
        lift()
        if closure is None:
            return None

        def lifting() -> Any:
            result = closure()
            lift()
            return result

        if len(args) > 1:
            return (args[0], lifting, *args[2:]), kwargs
        return args, {**kwargs, "closure": lifting}

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)
