"""Let the named adapters act that a batch names for its rows, in every loop of a Trainer."""

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from typing_extensions import override

from lightning_lora.model.active import Which, active
from lightning_lora.model.families import find_root


class AdapterOfRows(Callback):
    """Base of ``LoRACallback`` that runs every batch inside :func:`~lightning_lora.active`, as ``adapter_key`` says."""

    module: str | None  # name of the pretrained model
    adapter_key: str | None = None
    _acting: ExitStack | None = None  # while a batch runs

    def _begin(self, pl_module: "pl.LightningModule", batch: Any) -> None:
        self._end()
        if self.adapter_key is None:
            return
        _, root = find_root(pl_module, self.module)
        stack = ExitStack()
        stack.enter_context(active(root, _named_in(batch, self.adapter_key)))
        self._acting = stack

    def _end(self) -> None:
        stack, self._acting = self._acting, None
        if stack is not None:
            stack.close()

    @override
    def on_train_batch_start(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", batch: Any, batch_idx: int
    ) -> None:
        self._begin(pl_module, batch)

    @override
    def on_validation_batch_start(
        self,
        trainer: "pl.Trainer",
        pl_module: "pl.LightningModule",
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._begin(pl_module, batch)

    on_test_batch_start = on_predict_batch_start = on_validation_batch_start

    @override
    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self._end()
        super().on_train_batch_end(*args, **kwargs)

    @override
    def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self._end()

    on_test_batch_end = on_predict_batch_end = on_validation_batch_end

    @override
    def on_exception(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        self._end()


def _named_in(batch: Any, key: str) -> Which:
    """Return what a batch says about the adapters of its rows.

    Raises:
        ValueError: it does not say it.
    """
    which = batch.get(key) if isinstance(batch, Mapping) else getattr(batch, key, None)
    if which is None:
        there = f"keys {sorted(map(str, batch))}" if isinstance(batch, Mapping) else f"type {type(batch).__name__}"
        raise ValueError(
            f"adapter_key={key!r}: a batch of {there} does not name the adapters of its rows. Let the dataset give "
            f"every sample the key {key!r}: an adapter's name, or its place among the adapters"
        )
    return which if isinstance(which, (str, Tensor)) else list(which)
