"""Adapter-only checkpoints of every strategy: what the halves for Trainer and Fabric do alike."""

import functools
from abc import ABC
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_lora.checkpoint.atomic_io import make_atomic
from lightning_lora.checkpoint.file import SECTION, describe
from lightning_lora.checkpoint.frozen import describe_left_out, moved_tensors, other_left_out, refusal_of_left_out
from lightning_lora.checkpoint.optimizer_state import gathered_state
from lightning_lora.checkpoint.reading import read_checkpoint, renaming
from lightning_lora.distributed.ddp import Reduction, prepare_ddp, reduce_in_fixed_order
from lightning_lora.layers.class_swap import swap_class
from lightning_lora.model.state import OnNonfinite, check_finite
from lightning_lora.ops.sharded import on_rank_zero
from lightning_lora.strategies.shared.refusals import check_served


class AdapterCheckpoints(ABC):  # noqa: B024  # a mixin
    """Mixin of both halves' ``AdapterOnly``; it stands before Lightning's class.

    It has the base class of Lightning's strategies, without which Python gives none of their instances a class with it.

    Attributes:
        shards: whether the strategy spreads the model over ranks, so that reading it takes all of them.
        splits_adapters: whether it spreads the adapters over ranks, too.
    """

    shards: bool = False
    splits_adapters: bool = False
    _reductions: tuple[Reduction, ...] = ()  # of the models under DDP

    @property
    def own_precision(self: Any) -> Any:
        """The precision plugin, which the Trainer's strategies name otherwise than Fabric's."""
        return self.precision_plugin if hasattr(self, "precision_plugin") else self.precision

    @property
    def scaler(self) -> Any:
        """The ``GradScaler`` of 16-bit precision, or ``None``."""
        return getattr(self.own_precision, "scaler", None)

    def _num_ranks(self) -> int:
        return int(getattr(self, "world_size", 1))

    def random_state_of_this_rank(self, states: list[dict[str, Any]]) -> dict[str, Any]:
        """Return this rank's random states among those of all ranks."""
        return states[int(getattr(self, "global_rank", 0))]

    def _describe(self: Any, modules: Mapping[str, nn.Module]) -> dict[str, Any]:
        """Return the section about adapted modules, by their keys in the file; ``{}`` where it is not needed.

        Called on all ranks.
        """
        if not (self.is_global_zero or self.shards):
            return {}
        sections = [describe(module, key, moved_tensors(module)) for key, module in modules.items()]
        return {
            **sections[0],
            "adapters": [adapter for section in sections for adapter in section["adapters"]],
            "left_out": {key: describe_left_out(module) for key, module in modules.items()},
        }

    def _whole(self: Any, tensors: Mapping[str, Any]) -> dict[str, Any]:
        """Return tensors whole on rank 0, where those that are spread are gathered. Called on all ranks."""
        return {name: on_rank_zero(value, is_zero=self.is_global_zero) for name, value in tensors.items()}

    def _whole_state(self: Any, state: dict[str, Any], optimizer: Optimizer) -> dict[str, Any]:
        """Return an optimizer's state, whole on rank 0. Called on all ranks."""
        inner = getattr(optimizer, "optimizer", optimizer)  # of Lightning's wrapper
        return gathered_state(state, inner, is_zero=self.is_global_zero)

    def _read(self: Any, path: Any) -> dict[str, Any]:
        torch.cuda.empty_cache()
        return read_checkpoint(path, functools.partial(self.checkpoint_io.load_checkpoint, weights_only=True))

    def _check_left_out(self: Any, checkpoint: Mapping[str, Any], modules: Mapping[str, nn.Module], path: Any) -> None:
        """Raise ``ValueError`` on all ranks where rank 0 built what the file leaves out with other values.

        Args:
            modules: by their keys in the file.
        """
        recorded = checkpoint[SECTION].get("left_out", {})
        for key, module in modules.items():
            if key not in recorded:  # a file of an older version does not say
                continue
            name = None
            if self.is_global_zero or self.shards:
                name = other_left_out(recorded[key], module, renaming(checkpoint, module, path, key))
            name = self.broadcast(name)
            if name is not None:
                raise ValueError(refusal_of_left_out(name, path))

    def _check_finite(self: Any, adapters: Mapping[str, Any], path: Any, on_nonfinite: OnNonfinite) -> None:
        """Warn of adapters that hold NaN or infinity, or raise ``ValueError`` on all ranks. Called on all ranks."""
        failure = None
        try:
            check_finite(adapters, path, on_nonfinite)
        except ValueError as error:
            failure = str(error)
        if on_nonfinite == "error":
            failure = self.broadcast(failure)  # rank 0 alone holds whole tensors
        if failure is not None:
            raise ValueError(failure)

    def _reduce_in_order(self, wrapped: nn.Module) -> tuple[Reduction, ...]:
        """Make a model that DDP wraps sum its gradients in a fixed order; another model has no reduction."""
        reduction = reduce_in_fixed_order(wrapped, self)
        return () if reduction is None else (reduction,)

    @contextmanager
    def _filled(self) -> Iterator[None]:
        """Let what a backward inside the block does not reach count as zero under DDP."""
        with ExitStack() as stack:
            for reduction in self._reductions:
                stack.enter_context(reduction.filled())
            yield


def adopt_class(
    strategy: Any, mixin: type, stock: type[Any], ddp: type[Any], check_io: Callable[[Any], None] | None = None
) -> None:
    """Give ``strategy`` the class ``LoRA<Class>(mixin, <Class>)``; one that writes adapter-only files keeps its own.

    Args:
        stock: Trainer's or Fabric's strategy for one device, which is served beside DDP's.
        ddp: Trainer's or Fabric's strategy for DDP, whose reducer is set up otherwise.
        check_io: raises an error for a ``CheckpointIO`` that is not served.

    Raises:
        ValueError: the strategy is not served; the message says what to use.
    """
    check_served(strategy, (AdapterCheckpoints, stock, ddp))
    if check_io is not None:
        check_io(strategy.checkpoint_io)
    make_atomic(strategy.checkpoint_io)
    if not isinstance(strategy, AdapterCheckpoints):
        if isinstance(strategy, ddp):
            prepare_ddp(strategy)
        swap_class(strategy, mixin)
