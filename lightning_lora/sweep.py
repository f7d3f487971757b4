"""``Sweep``: train every combination of settings as an adapter of its own, in one run over one base."""

import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.fabric.utilities.rank_zero import rank_zero_info
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from typing_extensions import override

from lightning_lora.callback import LoRACallback
from lightning_lora.config import LoRAConfig
from lightning_lora.model.active import active
from lightning_lora.model.families import find_root
from lightning_lora.model.inject import remove
from lightning_lora.strategies.trainer.repeated import num_rows_of, repeated
from lightning_lora.strategies.trainer.sweep_results import SweepResults

OF_THE_OPTIMIZER = ("lr", "weight_decay", "lora_plus_ratio", "embedding_lr")


class Sweep(LoRACallback):
    """Train one adapter for every combination of a grid on the same batches, and keep the best one.

    The module is written as for one adapter: its ``training_step`` returns a mean loss, its ``validation_step`` logs
    the metric, and its ``configure_optimizers`` takes :func:`~lightning_lora.parameter_groups`, which gives each
    adapter the rates of the grid. In training each batch is repeated for every adapter, and all rows go through the
    base at once: activations are those of one run with as many rows, and beside them each adapter has its parameters
    and moments. Validation runs for one adapter after the other, and ``val_loss`` is logged as ``val_loss/r4-lr1e-4``
    and so on. Callbacks find the best one's as ``val_loss``.

    When the run ends, a table is printed, and all adapters but ``best_adapter`` are removed from the model.

    Args:
        config: the settings that are not in the grid.
        grid: values by setting: the fields of ``LoRAConfig``, and ``lr``, ``weight_decay``, ``lora_plus_ratio`` and
            ``embedding_lr``, which take the place of those that the module gives ``parameter_groups``.
        monitor: the metric that the module logs in validation.
        mode: "min" or "max", which of its values are better.
        halving: drop the worse half of the adapters after every so many validations, until one is left. Their rows are
            no longer run.
        exact: run the adapters one after the other, so that each equals a run of its own bit for bit. It is slower. It
            serves models and losses that mix the rows of a batch, too.
        plot: the file to draw the metric of every adapter into when the run ends. Needs matplotlib.

    Other arguments are those of :class:`LoRACallback`.

    Raises:
        ValueError: the grid is empty, or has a setting or a value that nothing takes.

    Example::

        sweep = Sweep(grid={"r": [4, 16, 64], "lr": [1e-4, 3e-4, 1e-3]}, halving=2)
        L.Trainer(callbacks=[sweep], max_epochs=4).fit(module, datamodule)
        save_peft(module.model, "best", adapter=sweep.best_adapter)
    """

    def __init__(
        self,
        config: LoRAConfig | None = None,
        grid: Mapping[str, Sequence[Any]] | None = None,
        *,
        monitor: str = "val_loss",
        mode: Literal["min", "max"] = "min",
        halving: int | None = None,
        exact: bool = False,
        plot: str | Path | None = None,
        **arguments: Any,
    ) -> None:
        if not grid or not all(grid.values()):
            raise ValueError(f"grid={grid!r} must have values for each of its settings, such as {{'r': [4, 16]}}")
        if halving is not None and halving < 1:
            raise ValueError(f"halving={halving} must be a number of validations from 1")
        settings = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
        named = {_name(one): one for one in settings}
        if len(named) < len(settings):
            raise ValueError(f"grid={dict(grid)!r} has a combination twice")
        adapters = {name: replace(config or LoRAConfig(), **_split(one)[0]) for name, one in named.items()}
        super().__init__(adapters=adapters, **arguments)
        self.rates = {name: _split(one)[1] for name, one in named.items()}
        self.results = SweepResults(list(named), monitor, mode)
        self.halving, self.exact, self.plot = halving, exact, plot
        self._num_validations = 0
        self._own: dict[str, Any] = {}  # the module's steps

    @property
    def best_adapter(self) -> str | None:
        """The adapter with the best last value of the metric, of those that are not dropped."""
        return self.results.best

    @override
    def state_dict(self) -> dict[str, Any]:
        own = {"results": self.results.state_dict(), "num_validations": self._num_validations}
        return {**super().state_dict(), "sweep": own}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.results.load_state_dict(state_dict["sweep"]["results"])
        self._num_validations = state_dict["sweep"]["num_validations"]

    @override
    def setup(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        for name, stand_in in {"training_step": self._train, "validation_step": self._validate}.items():
            if is_overridden(name, pl_module):
                own = self._own[name] = getattr(pl_module, name)
                vars(pl_module)[name] = functools.wraps(own)(functools.partial(stand_in, pl_module))

    @override
    def teardown(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        self._give_back(pl_module)

    @override
    def on_exception(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        self._give_back(pl_module)

    def _give_back(self, pl_module: "pl.LightningModule") -> None:
        for name in self._own:
            vars(pl_module).pop(name, None)
        self._own = {}

    def _train(self, pl_module: "pl.LightningModule", batch: Any, *args: Any, **kwargs: Any) -> Any:
        """Stand in for ``training_step``: return the sum of the losses of all adapters on the same batch."""
        step, names, (_, root) = self._own["training_step"], self.results.remaining, find_root(pl_module, self.module)
        if self.exact:
            losses = []
            for name in names:
                with active(root, name):
                    losses.append(_loss_of(step(batch, *args, **kwargs)))
            return functools.reduce(Tensor.add, losses)
        num_rows = num_rows_of(batch)
        with active(root, [name for name in names for _ in range(num_rows)]):
            loss = _loss_of(step(repeated(batch, num_rows, len(names)), *args, **kwargs))
        return loss * len(names)  # the mean over all rows is the mean of the adapters' means

    def _validate(self, pl_module: "pl.LightningModule", *args: Any, **kwargs: Any) -> None:
        """Stand in for ``validation_step``: run it for each adapter, which logs under a name of its own."""
        _, root = find_root(pl_module, self.module)
        log = pl_module.log
        for name in self.results.remaining:
            vars(pl_module)["log"] = functools.partial(_log_as, log, name)
            try:
                with active(root, name):
                    self._own["validation_step"](*args, **kwargs)
            finally:
                del vars(pl_module)["log"]

    @override
    def on_validation_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        if trainer.sanity_checking:
            return
        metrics, results = trainer.callback_metrics, self.results
        for name in results.remaining:
            key = f"{results.monitor}/{name}"
            if key not in metrics:
                raise ValueError(f"validation_step logged {sorted(metrics)} and no {results.monitor!r}: give monitor=")
            value = trainer.strategy.broadcast(float(metrics[key]))  # ranks that log their own value decide alike
            results.history[name].append((trainer.global_step, value))
        assert results.best is not None
        metrics[results.monitor] = metrics[f"{results.monitor}/{results.best}"]
        self._num_validations += 1
        if self.halving is not None and self._num_validations % self.halving == 0 and len(results.remaining) > 1:
            rank_zero_info(f"sweep: dropped at step {trainer.global_step}: {', '.join(results.halve())}")

    @override
    def on_fit_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        best = self.best_adapter
        if best is None:
            raise ValueError("the run ended before its first validation, so that no adapter is known to be the best")
        rank_zero_info(f"{self.results.table()}\nbest: {best}")
        if self.plot is not None and trainer.is_global_zero:
            self.results.plot(self.plot)
        _, root = find_root(pl_module, self.module)
        for name in self.adapters:
            if name != best:
                remove(root, adapter=name)
        self.adapters = {best: self.adapters[best]}


def _split(settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, float]]:
    """Return the fields of ``LoRAConfig`` among settings, and the rates."""
    fields = {key: value for key, value in settings.items() if key not in OF_THE_OPTIMIZER}
    return fields, {key: value for key, value in settings.items() if key in OF_THE_OPTIMIZER}


def _name(settings: Mapping[str, Any]) -> str:
    """Return the name of a combination, such as ``r4-lr1e-4``."""
    return "-".join(f"{key}{_short(value)}" for key, value in settings.items())


def _short(value: Any) -> str:
    """Return a value in letters, digits, ``_`` and ``-``: 1e-4 for 0.0001, 15e-1 for 1.5."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        _, digits, exponent = Decimal(repr(value)).normalize().as_tuple()
        number = "".join(map(str, digits))
        assert isinstance(exponent, int)
        return f"{number}{'0' * exponent}" if exponent >= 0 else f"{number}e{exponent}"
    parts = value if isinstance(value, (list, tuple)) else [value]
    return "-".join("".join(one if one.isalnum() or one in "_-" else "_" for one in str(part)) for part in parts)


def _loss_of(result: Any) -> Tensor:
    loss = result["loss"] if isinstance(result, Mapping) else result
    if not isinstance(loss, Tensor):
        raise ValueError(f"training_step returned {type(result).__name__}: a sweep needs the loss of every batch")
    return loss


def _log_as(log: Any, adapter: str, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
    if hasattr(value, "compute"):
        raise ValueError(
            f"{name!r} is logged as a {type(value).__name__}, which would sum up over all adapters of the sweep: log "
            "the value of each batch"
        )
    log(f"{name}/{adapter}", value, *args, **kwargs)
