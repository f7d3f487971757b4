"""Let ranks evaluate unequal numbers of batches, though every forward gathers weights from all ranks."""

import functools
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from lightning_lora.compat.distributed import gather_once
from lightning_lora.compat.lightning import outputs_method


class UnequalEvaluation:
    """Lets a rank that has no more batches gather weights with those that have.

    FSDP2 gathers a block's weights from all ranks in every forward. So a rank that is done repeats the gathers of its
    last batch, without computing anything, until no rank has a batch left. Numbers of batches are compared once, when
    an evaluation begins. Only where they differ or are not known, one number is reduced before every batch.
    """

    def __init__(self, trainer: "pl.Trainer", model: nn.Module) -> None:
        self._trainer = trainer
        self._units = [module for module in model.modules() if isinstance(module, FSDPModule)]
        self._gathered: list[Any] = []
        self._hooks: list[Any] = []
        self._unequal = False
        for loop in _loops(trainer):
            _do_before(loop, "on_run_start", functools.partial(self._begin, loop))
            if name := outputs_method(loop):  # reduces what was logged, after every dataloader
                _do_before(loop, name, self._join)
            _do_before(loop, "on_run_end", self._end)

    def before_batch(self) -> None:
        """Say that this rank has a batch. Called on every rank that has one."""
        if self._unequal:
            self._any_has_a_batch(own=True)
            self._gathered.clear()

    def _begin(self, loop: Any) -> None:
        """Find out whether ranks have unequal numbers of batches. Called on all ranks."""
        everyones: list[Any] = [None] * self._trainer.world_size
        torch.distributed.all_gather_object(everyones, list(loop.max_batches))
        self._unequal = any(one != everyones[0] or float("inf") in one for one in everyones)
        if self._unequal:
            self._gathered = list(self._units)  # of a rank that has no batch at all: in the order of a forward
            self._hooks = [unit.register_forward_pre_hook(self._note) for unit in self._units]

    def _note(self, unit: nn.Module, _: Any) -> None:
        self._gathered.append(unit)

    def _join(self) -> None:
        """Gather with the other ranks until none has a batch. Called on all ranks."""
        while self._unequal and self._any_has_a_batch(own=False):
            for unit in self._gathered:
                gather_once(unit)

    def _end(self) -> None:
        self._join()
        self._unequal = False
        while self._hooks:
            self._hooks.pop().remove()

    def _any_has_a_batch(self, *, own: bool) -> bool:
        left = torch.tensor(int(own), device=self._trainer.strategy.root_device)
        torch.distributed.all_reduce(left, torch.distributed.ReduceOp.MAX)
        return bool(left)


def check_equal_evaluation(trainer: "pl.Trainer", group: Any) -> None:
    """Make every evaluation begin with a check that the ranks of ``group`` have equal numbers of batches."""
    for loop in _loops(trainer):
        _do_before(loop, "on_run_start", functools.partial(_check_equal, loop, group))


def _check_equal(loop: Any, group: Any) -> None:
    everyones: list[Any] = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(everyones, list(loop.max_batches), group=group)
    if any(one != everyones[0] for one in everyones):
        raise ValueError(
            f"ranks that share a model have different numbers of batches to evaluate: {everyones}. Split the data by "
            "the strategy's distributed_sampler_kwargs (Lightning's own sampler does), not by the global rank"
        )


def _loops(trainer: "pl.Trainer") -> list[Any]:
    validation = trainer.fit_loop.epoch_loop.val_loop
    return [validation, trainer.validate_loop, trainer.test_loop, trainer.predict_loop]


def _do_before(loop: Any, name: str, first: Callable[[], None]) -> None:
    """Make a loop's method call ``first`` before its own code; the wrapper of an earlier run is dropped."""
    vars(loop).pop(name, None)
    setattr(loop, name, functools.partial(_one_after_the_other, first, getattr(loop, name)))


def _one_after_the_other(first: Callable[[], None], second: Callable[[], Any]) -> Any:
    first()
    return second()
