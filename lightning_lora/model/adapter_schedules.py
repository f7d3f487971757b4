"""Schedules that follow each named adapter's own optimizer steps."""

from collections.abc import Callable, Mapping
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from typing_extensions import override

Make = Callable[[Optimizer], LRScheduler]


class AdapterSchedules(LRScheduler):
    """A schedule of its own for each named adapter. It advances by the steps that this adapter took.

    An adapter without rows in a step does not take it: its moments stay, and so does its rate.

    Args:
        optimizer: over the groups of :func:`~lightning_lora.parameter_groups`.
        schedules: a function that makes any of torch's schedulers of the groups of one adapter, for all adapters; or
            one for each, by name. Adapters that are left out keep their rates.

    Raises:
        ValueError: the optimizer has no groups of an adapter of that name, or a scheduler looks at a metric.

    Example::

        def configure_optimizers(self):
            optimizer = torch.optim.AdamW(parameter_groups(self, lr=1e-4))
            schedules = AdapterSchedules(
                optimizer,
                {"law": lambda groups: CosineAnnealingLR(groups, 1000), "medicine": lambda groups: LinearLR(groups)},
            )
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedules, "interval": "step"}}
    """

    def __init__(self, optimizer: Optimizer, schedules: Make | Mapping[str, Make]) -> None:
        known = list(dict.fromkeys(group["adapter"] for group in optimizer.param_groups if "adapter" in group))
        made = schedules if isinstance(schedules, Mapping) else dict.fromkeys(known, schedules)
        unknown = [name for name in made if name not in known]
        if unknown or not known:
            raise ValueError(
                f"the optimizer has groups of the adapters {known}, and schedules are for {list(made)}: build it of "
                "parameter_groups(model, lr), and name adapters that the model has"
            )
        self.optimizer = optimizer
        self.schedules = {name: make(_GroupsOf(optimizer, name)) for name, make in made.items()}
        for name, one in self.schedules.items():
            if isinstance(one, ReduceLROnPlateau):
                raise ValueError(f"the schedule of {name!r} looks at a metric, and these schedules follow steps alone")
        self.pending = dict.fromkeys(made, 0)  # steps since the schedules advanced
        optimizer.register_step_post_hook(self._count)

    def _count(self, optimizer: Optimizer, *_: Any) -> None:
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is not None and bool(found_inf):  # fused ones skip the step inside
            return
        for name, schedule in self.schedules.items():
            groups = schedule.optimizer.param_groups
            self.pending[name] += any(one.grad is not None for group in groups for one in group["params"])

    @override
    def step(self, epoch: int | None = None) -> None:
        """Advance each schedule by the steps that its adapter took since the last call."""
        for name, schedule in self.schedules.items():
            for _ in range(self.pending[name]):
                schedule.optimizer.step()
                schedule.step()
            self.pending[name] = 0

    @override
    def get_last_lr(self) -> list[Any]:
        return [group["lr"] for group in self.optimizer.param_groups]

    @override
    def state_dict(self) -> dict[str, Any]:
        states = {name: schedule.state_dict() for name, schedule in self.schedules.items()}
        return {"schedules": states, "pending": dict(self.pending)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint; an adapter that it does not have starts anew."""
        for name, schedule in self.schedules.items():
            if name in state_dict["schedules"]:
                schedule.load_state_dict(state_dict["schedules"][name])
                self.pending[name] = state_dict["pending"][name]


class _GroupsOf(Optimizer):
    """The groups of one adapter, as an optimizer to torch's schedulers. It steps nothing."""

    whole: Optimizer
    adapter: str

    def __init__(self, optimizer: Optimizer, adapter: str) -> None:
        self.__dict__.update(whole=optimizer, adapter=adapter, defaults=optimizer.defaults)

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]  # those that a checkpoint put in, too
        return [group for group in self.whole.param_groups if group.get("adapter") == self.adapter]

    @override
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Note that the adapter took a step."""
