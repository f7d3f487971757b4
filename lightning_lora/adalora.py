""":class:`AdaLoRA`: how many ranks the layers share at each step of a run; a frozen record that checks itself."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class AdaLoRA:
    """Settings of AdaLoRA (Zhang et al. 2023): layers start at one rank, and the least important ranks are pruned.

    An adapter is ``scaling * B diag(E) A``, with ``scaling = alpha / (init_r + 1e-5)``. A rank of a layer is a row of
    A, an entry of E and a column of B. It is pruned by setting its entry of E to zero. The names and the defaults are
    those of PEFT's ``AdaLoraConfig``.

    Attributes:
        target_r: rank of a layer at the end, on average over the layers.
        init_r: rank of every layer at the start.
        tinit: number of steps before the first pruning.
        tfinal: number of steps after the last pruning, in which the ranks stay as they are.
        deltaT: number of steps between two prunings. In between, pruned ranks train and can come back.
        beta1: how much of the average sensitivity of each parameter is kept at each step.
        beta2: how much of its average uncertainty is kept at each step.
        orth_reg_weight: weight of the loss term that keeps the rows of A and the columns of B orthonormal.
        total_step: number of optimizer steps of the whole run. ``None`` takes it from the Trainer.

    Raises:
        ValueError, TypeError: a value is out of range or of the wrong type; the message says what was expected.

    Example::

        LoRACallback(adalora=AdaLoRA(target_r=8, init_r=12, tinit=200, tfinal=500))
    """

    target_r: int = 8
    init_r: int = 12
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    total_step: int | None = None

    def __post_init__(self) -> None:
        for name, lowest in {"target_r": 1, "init_r": 1, "tinit": 0, "tfinal": 0, "deltaT": 1, "total_step": 1}.items():
            value = getattr(self, name)
            if value is None and name == "total_step":
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"AdaLoRA({name}={value!r}) must be an integer; got {type(value).__name__}")
            if value < lowest:
                raise ValueError(f"AdaLoRA({name}={value!r}) must be at least {lowest}")
        for name in ("beta1", "beta2", "orth_reg_weight"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"AdaLoRA({name}={value!r}) must be a number; got {type(value).__name__}")
            if name != "orth_reg_weight" and not 0 < value < 1:
                raise ValueError(f"AdaLoRA({name}={value!r}) must lie between 0 and 1")
        if not math.isfinite(self.orth_reg_weight) or self.orth_reg_weight < 0:
            raise ValueError(f"AdaLoRA(orth_reg_weight={self.orth_reg_weight!r}) must be a finite number from 0")
        if self.target_r > self.init_r:
            raise ValueError(
                f"AdaLoRA(target_r={self.target_r}, init_r={self.init_r}): ranks are pruned from init_r down to "
                "target_r, so target_r must not be larger"
            )
        if self.total_step is not None:
            self.last_pruning(self.total_step)

    @classmethod
    def of(cls, value: Any) -> "AdaLoRA | None":
        """Return the record that a record, its values by name, or ``None`` mean."""
        if value is None or isinstance(value, cls):
            return value
        if not isinstance(value, Mapping):
            raise TypeError(f"adalora={value!r} must be an AdaLoRA(target_r=..., ...); got {type(value).__name__}")
        names = [field.name for field in fields(cls)]
        unknown = sorted(map(str, set(value) - set(names)))
        if unknown:
            raise TypeError(f"adalora has no settings {unknown}; it has {', '.join(names)}")
        return cls(**value)

    def exclusions(self, config: Any) -> Iterator[tuple[bool, str]]:
        """Yield the fields of a LoRAConfig that AdaLoRA excludes: (is one given, message)."""
        own = {"rank_pattern": None, "alpha_pattern": None, "target_parameters": None, "init": "kaiming"}
        for name, default in {**own, **dict.fromkeys(("use_dora", "lora_bias", "use_rslora"), False)}.items():
            value = getattr(config, name)
            message = f"adalora cannot be had with {name}={value!r}: AdaLoRA has its own start, scale and ranks"
            yield bool(value) and value != default, f"{message}. Leave it out"
        yield config.r not in (type(config).r, self.init_r), self.refusal_of_rank(config.r)

    def refusal_of_rank(self, r: Any) -> str:
        """Return why a rank other than ``init_r`` is refused."""
        return f"r={r} beside AdaLoRA(init_r={self.init_r}): layers start at init_r. Leave r out"

    def last_pruning(self, total_step: int) -> int:
        """Return the step after which the ranks stay as they are, in a run of ``total_step`` steps.

        Raises:
            ValueError: the run is too short to prune at all.
        """
        last = total_step - self.tfinal
        if self.tinit >= last:
            raise ValueError(
                f"AdaLoRA prunes after step tinit={self.tinit} and up to step total_step - tfinal = {total_step} - "
                f"{self.tfinal} = {last}, so that no step is left to prune in: train for more steps, or give a smaller "
                "tinit or tfinal"
            )
        return last

    def budget(self, step: int, total_step: int, *, first: int, final: int) -> int | None:
        """Return how many ranks all layers keep together after a step; ``None`` where nothing is pruned.

        The number falls from ``first`` to ``final`` as a cubic function of the step (sec. 3.3 of the paper).
        """
        last = self.last_pruning(total_step)
        if step <= self.tinit or step > last or (step < last and step % self.deltaT):
            return None
        remaining = 1 - (step - self.tinit) / (last - self.tinit)
        return int((first - final) * remaining**3 + final)
