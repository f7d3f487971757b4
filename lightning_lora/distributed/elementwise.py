"""Try whether an optimizer steps on parts of tensors as on whole ones, on small tensors."""

import copy
import inspect
import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_lora.checkpoint.packed_optimizer import packer
from lightning_lora.compat.torch import is_optimizer_hook
from lightning_lora.ops.sharded import (
    collective_device,
    is_dtensor,
    is_sharded,
    local_part,
    logical,
    split_over,
    spread_like,
    whole,
)

_NUM_STEPS = 8
_MAX_SIZE = 64  # of a dimension of the tensors to try on
_TOLERANCE = 1e-3  # of the largest change: another order of sums is no other formula
_LR = 1e-2
_RIGHT, _UNTRIED, _WRONG = range(3)


def check_steps_on_parts(optimizer: Optimizer) -> None:
    """Raise ``ValueError`` for an optimizer whose steps on tensors that are spread over ranks would be wrong.

    An update that is computed entry by entry (AdamW, SGD) is right on parts. One that reads other entries (factored,
    orthogonalised, trust-ratio, quasi-Newton) is not, unless the optimizer asks the other ranks for them. Which it is
    is tried: two copies of the optimizer, with its settings and without its state, take a few steps on small tensors
    of the kinds that it holds, one on whole ones and one on what is spread. Neither the optimizer nor a random
    generator is touched. Called on all ranks. An optimizer that cannot be copied or tried passes with a warning.
    """
    spread = [p for group in optimizer.param_groups for p in group["params"] if is_sharded(p)]
    if not spread:
        return
    if packer(optimizer) is not None:
        raise ValueError(
            f"{type(optimizer).__name__} keeps its state in blocks of 8 or 4 bits, and some of what it trains is "
            "spread over ranks, where such a state cannot be gathered into a file: keep what trains whole on every "
            "rank (shard_adapters=False, fewer modules_to_save), or take AdamW"
        )
    with isolate_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        verdict, failure = _verdict(optimizer)
    worst = torch.tensor(verdict, device=collective_device(spread[0]))
    torch.distributed.all_reduce(worst, torch.distributed.ReduceOp.MAX)
    name = type(optimizer).__name__
    reason = "" if failure is None else f" ({type(failure).__name__}: {failure})"
    if worst == _UNTRIED:
        rank_zero_warn(
            f"{name} could not be tried on small tensors{reason}. It holds tensors that are spread over ranks, and its "
            "steps on them are right only if the update of one entry reads no other"
        )
    if worst == _WRONG:
        remedy = (
            "leave shard_adapters=False, which keeps adapters whole"
            if is_dtensor(spread[0])
            else "use strategy='fsdp_lora' or 'ddp', which keep adapters whole"
        )
        raise ValueError(
            f"{name} with these settings does not step on parts of tensors as on whole ones{reason}, and each rank "
            "holds a part of the adapters: the update of one entry must not read others, as factored, orthogonalised, "
            "trust-ratio and quasi-Newton optimizers do. Take an optimizer that steps entry by entry, such as AdamW or "
            f"SGD, or {remedy}"
        ) from failure


def _verdict(optimizer: Optimizer) -> tuple[int, Exception | None]:
    """Return how this rank's parts were stepped on, and the error that the optimizer raised, if it did."""
    trials = _trials(optimizer)
    for spread in (False, True):
        twins = {key: trial.spread if spread else trial.whole for key, trial in trials.items()}
        try:
            _step(_copied(optimizer, twins), trials, spread=spread)
        except Exception as error:  # nobody knows what an optimizer of the user's needs
            return _WRONG if spread else _UNTRIED, error
    return _RIGHT if all(trial.agrees() for trial in trials.values()) else _WRONG, None


@dataclass
class _Trial:
    """A small tensor to try an optimizer on, whole and as the optimizer's own tensors are spread.

    The loss of a step is ``sum(slope * (w - goal)**2 / 2)``.
    """

    start: Tensor
    slope: Tensor
    goals: list[Tensor]
    whole: nn.Parameter
    spread: nn.Parameter

    @torch.no_grad()
    def backward(self, step: int, *, spread: bool) -> Tensor:
        """Set the gradient of the whole tensor or of the spread one; return the loss, of a part that part's alone."""
        parameter = self.spread if spread else self.whole
        slope, goal = (spread_like(one, parameter) if spread else one for one in (self.slope, self.goals[step]))
        distance = parameter.detach() - goal
        parameter.grad = slope * distance
        loss = (slope * distance.square()).sum() / 2
        # where ranks step together they must decide by the same loss; parts are stepped on by each rank for itself
        return whole(loss).float().cpu()

    def agrees(self) -> bool:
        """Whether both ended at the same values."""
        ended, expected = self.whole.detach(), local_part(spread_like(self.whole.detach(), self.spread))
        found = local_part(self.spread.detach())
        change = (ended - self.start).abs().max()
        rounding = 4 * torch.finfo(ended.dtype).eps * ended.abs().max()
        difference = (found - expected).nan_to_num(posinf=0.0, neginf=0.0).abs()
        same_finite = torch.equal(torch.isfinite(found), torch.isfinite(expected))
        return same_finite and bool((difference <= torch.maximum(_TOLERANCE * change, rounding)).all())


def _trials(optimizer: Optimizer) -> dict[int, _Trial]:
    """Return a trial for each parameter of an optimizer, by its identity: one for each kind in each group."""
    trials: dict[int, _Trial] = {}
    generator = torch.Generator().manual_seed(0)
    for group in optimizer.param_groups:
        kinds: dict[Any, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            kinds.setdefault(_kind(parameter), []).append(parameter)
        for alike in kinds.values():
            largest = max(alike, key=lambda parameter: logical(parameter).numel())
            trials |= dict.fromkeys(map(id, alike), _trial(largest, generator))
    return trials


def _kind(parameter: Any) -> Any:
    described = logical(parameter)
    placements = tuple(described.placements) if is_sharded(parameter) else ()
    return parameter.ndim, parameter.dtype, parameter.device, is_dtensor(parameter), placements


def _trial(like: Any, generator: torch.Generator) -> _Trial:
    described = logical(like)
    ranks = described.device_mesh.size() if is_sharded(like) else 1
    # sizes that ranks divide as they divide the tensor's own, stripes too
    unit = ranks * (like.lora_split[2] if hasattr(like, "lora_split") else 1)
    shape = [size if size <= _MAX_SIZE else max(_MAX_SIZE // unit, 1) * unit for size in described.shape]

    def values(growth: float) -> Tensor:
        # entries of other sizes on every rank, so that what is taken over a part is not nearly that of the whole
        scaled = torch.randn(shape, generator=generator)
        for dim, size in enumerate(shape):
            scale = torch.logspace(-growth, growth, size)
            scaled *= scale.view([-1 if d == dim else 1 for d in range(len(shape))])
        return scaled.to(like.device, like.dtype)

    start, slope, goals = values(0.5), values(-1.0).abs(), [values(0.5) for _ in range(_NUM_STEPS)]
    spread = nn.Parameter(spread_like(start.clone(), like).clone())
    if hasattr(like, "lora_split"):
        split_over(spread, *like.lora_split)
    return _Trial(start, slope, goals, nn.Parameter(start.clone()), spread)


def _copied(optimizer: Optimizer, twins: Mapping[int, nn.Parameter]) -> Optimizer:
    """Return an optimizer with the same settings for other tensors, in its first state and without hooks.

    Raises:
        TypeError: it holds a model.
    """
    if any(isinstance(value, nn.Module) for value in vars(optimizer).values()):
        raise TypeError("it holds a model, which is not copied")
    copied: Optimizer = object.__new__(type(optimizer))
    memo: dict[int, Any] = {**twins, id(optimizer): copied}
    groups: list[dict[str, Any]] = []
    state: defaultdict[Any, dict[str, Any]] = defaultdict(dict)
    for group in optimizer.param_groups:
        parameters = list(dict.fromkeys(twins[id(parameter)] for parameter in group["params"]))
        memo[id(group["params"])] = parameters
        for parameter in group["params"]:
            for key, value in optimizer.state.get(parameter, {}).items():  # as some make it from the start
                state[twins[id(parameter)]][key] = _state_like(value, parameter, twins[id(parameter)])
        settings = {key: value for key, value in group.items() if key != "params"}
        groups.append({"params": parameters, **copy.deepcopy(settings, memo)})
        memo[id(group)] = groups[-1]
        if "param_names" in group:
            groups[-1]["param_names"] = [f"{index}" for index in range(len(parameters))]
        lr = group.get("lr")
        if isinstance(lr, (int, float, Tensor)) and float(lr) < _LR:  # 0 where a schedule warms up
            groups[-1]["lr"] = torch.full_like(lr, _LR) if isinstance(lr, Tensor) else _LR
    memo |= {id(optimizer.param_groups): groups, id(optimizer.state): state}
    own = {
        key: OrderedDict() if is_optimizer_hook(key) else value
        for key, value in vars(optimizer).items()
        if not (callable(value) and hasattr(type(optimizer), key))  # a schedule wraps the class's own methods
    }
    copied.__dict__.update(copy.deepcopy(own, memo))
    return copied


def _state_like(value: Any, parameter: nn.Parameter, twin: nn.Parameter) -> Any:
    if isinstance(value, Tensor) and value.shape == parameter.shape:
        return torch.full_like(twin.detach(), local_part(value).flatten()[0].item(), dtype=value.dtype)
    return copy.deepcopy(value)


def _step(optimizer: Optimizer, trials: Mapping[int, _Trial], *, spread: bool) -> None:
    step: Any = optimizer.step
    takes_closure = "closure" in inspect.signature(step).parameters
    different = {id(trial): trial for trial in trials.values()}.values()

    def backward(index: int) -> Tensor:
        return torch.stack([trial.backward(index, spread=spread) for trial in different]).sum()

    for index in range(_NUM_STEPS):
        backward(index)
        if takes_closure:
            step(closure=partial(backward, index))
        else:
            step()
