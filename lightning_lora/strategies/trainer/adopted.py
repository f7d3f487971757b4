"""Trainer lifecycle of Lightning's own strategies for one device and DDP, which are adopted in place.

:func:`adopt` swaps a strategy's class for ``LoRA<Strategy>(AdoptedStrategy, <Strategy>)``: what it did before it still
does, but its checkpoints hold the adapters and whatever else trains, and DDP sums gradients in a fixed order.
"""

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy
from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_lora.distributed.ddp import share_buffers_again, share_buffers_once
from lightning_lora.strategies.shared.adapter_only import adopt_class
from lightning_lora.strategies.shared.bitsandbytes_precision import convert_under_adapters
from lightning_lora.strategies.shared.refusals import check_has_values, check_reader, check_whole, first_on_meta
from lightning_lora.strategies.trainer.adapter_only import AdapterOnly
from lightning_lora.strategies.trainer.lockstep import Lockstep
from lightning_lora.strategies.trainer.logged import log_adapters


class AdoptedStrategy(AdapterOnly):
    """Mixin for a strategy of Lightning's own that every rank holds the whole model under."""

    @override
    def setup(self, trainer: "pl.Trainer") -> None:
        self.lockstep = Lockstep(trainer)
        log_adapters(trainer)
        convert_under_adapters(self.precision_plugin, self._adapted_module())
        super().setup(trainer)

    @override
    def on_validation_start(self) -> None:
        share_buffers_once(self.model)
        super().on_validation_start()

    @override
    def on_validation_end(self) -> None:
        share_buffers_again(self.model)
        super().on_validation_end()

    @override
    def model_to_device(self) -> None:
        check_has_values(self._adapted_module(), type(self).__name__)
        super().model_to_device()  # type: ignore[safe-super]  # of the strategy mixed in with

    @override
    def teardown(self) -> None:
        if self.lockstep is not None:
            self.lockstep.close()
        try:
            super().teardown()
        except NotImplementedError:  # a model without values cannot go back to CPU, and was refused with a reason
            if first_on_meta(self._adapted_module()) is None:
                raise

    @override
    def _setup_model(self, model: nn.Module) -> nn.Module:
        check_whole(model, type(self).__name__)
        wrapped = super()._setup_model(model)
        self._reductions = self._reduce_in_order(wrapped)
        return wrapped

    @override
    def backward(self, closure_loss: torch.Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Any:
        """Run backward; under DDP, what this rank did not use counts as zero before any hook can read gradients."""
        self.pre_backward(closure_loss)
        for reduction in self._reductions:
            reduction.begin()
        module = self._adapted_module()
        closure_loss = self.precision_plugin.pre_backward(closure_loss, module)
        with self._filled():
            self.precision_plugin.backward(closure_loss, module, optimizer, *args, **kwargs)
        closure_loss = self.precision_plugin.post_backward(closure_loss, module)
        self.post_backward(closure_loss)
        return closure_loss


def adopt(strategy: Strategy) -> AdapterOnly:
    """Make a Trainer's strategy write and read adapter-only checkpoints, in place; see :func:`swap_class`.

    Raises:
        ValueError: the strategy, or how it reads files, is not served.
    """
    adopt_class(strategy, AdoptedStrategy, SingleDeviceStrategy, DDPStrategy, check_reader)
    assert isinstance(strategy, AdapterOnly)
    return strategy
