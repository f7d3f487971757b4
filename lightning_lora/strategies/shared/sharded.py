"""Placement and gradient reduction of sharded strategies: what the halves for Trainer and Fabric do alike."""

import functools
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack
from typing import Any

from torch import nn
from torch.optim import Optimizer

from lightning_lora.distributed.gradients import GradientReducer
from lightning_lora.model.state import injected_roots, require_injection
from lightning_lora.strategies.shared.adapter_only import AdapterCheckpoints
from lightning_lora.strategies.shared.launched import Launched
from lightning_lora.strategies.shared.refusals import check_adalora


class Sharded(Launched, AdapterCheckpoints):
    """Mixin of ``fsdp_lora`` and ``megatron_lora`` for Trainer and Fabric.

    A subclass says how a model is placed (:meth:`place`) and over which ranks which gradients are averaged
    (:meth:`make_reducers`). Each placed model has reducers of its own: what is summed where must not depend on the
    models beside it.
    """

    shards = True
    strategy_name: str

    def place(self, model: nn.Module) -> None:
        """Spread a model over the ranks in place, each part on its device. Called on all ranks."""
        raise NotImplementedError

    def make_reducers(self, model: nn.Module) -> list[GradientReducer]:
        """Return what averages the gradients of a placed model; the first takes in what is unfrozen later."""
        raise NotImplementedError

    def after_reduction(self, model: nn.Module) -> None:
        """Mend what the gradients of a placed model need besides."""

    def may_train(self, model: nn.Module) -> Iterable[nn.Parameter]:
        """Return the parameters among which some may have been unfrozen since the model was placed."""
        return model.parameters()

    def accumulating(self, model: nn.Module) -> AbstractContextManager[Any]:
        """Let the gradients of a placed model accumulate on each rank, without communication."""
        stack = ExitStack()
        for reducer in self._reducers[model]:
            stack.enter_context(reducer.no_sync())
        return stack

    @functools.cached_property
    def _reducers(self) -> dict[nn.Module, list[GradientReducer]]:
        return {}

    def _each_reducer(self) -> Iterator[GradientReducer]:
        for reducers in self._reducers.values():
            yield from reducers

    def check_adapted(self, model: nn.Module) -> None:
        """Raise ``ValueError`` for a model without adapters."""
        if not injected_roots(model):
            raise ValueError(
                f"{self.strategy_name!r} shards the frozen base of an adapted model, and {type(model).__name__} holds "
                "no adapters: add LoRACallback(...) to the Trainer's callbacks, or call inject(model, LoRAConfig(...)) "
                "first"
            )
        for root in injected_roots(model).values():
            for config in require_injection(root).configs.values():
                check_adalora(self, config)

    def _watch(self, model: nn.Module) -> None:
        """Average the gradients of a placed model from here on."""
        for reducer in self._reducers.pop(model, ()):
            reducer.release()
        self._reducers[model] = self.make_reducers(model)

    def _release(self) -> None:
        """Average no gradients of any model any more."""
        for reducer in self._each_reducer():
            reducer.release()
        self._reducers.clear()

    def _before_step(self, optimizer: Optimizer, *, reduces: bool) -> None:
        if reduces:
            self._reduce_pending()

    def _reduce_pending(self) -> None:
        for reducer in self._each_reducer():
            reducer.before_step()

    def _before_backward(self) -> None:
        for reducer in self._each_reducer():
            reducer.before_backward()

    def _after_backward(self) -> None:
        """Reduce all gradients, or none in an accumulation. Called on all ranks."""
        for model, reducers in self._reducers.items():
            for reducer in reducers:
                reducer.add(self.may_train(model))
                reducer.after_backward()
            if not reducers[0].is_blocked:
                self.after_reduction(model)

    def _check_equal(self) -> None:
        """Raise ``ValueError`` if what every rank holds alike differs. Called on all ranks."""
        for reducer in self._each_reducer():
            reducer.check_equal()
