"""``LoRACallback``: one line in ``Trainer(callbacks=[...])`` that makes a run a LoRA run."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.fabric.utilities.rank_zero import rank_zero_info
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_lora.checkpoint.frozen import look_for_moved
from lightning_lora.config import LoRAConfig, Quantization
from lightning_lora.model.adapters import check_name
from lightning_lora.model.base_form import check_kind
from lightning_lora.model.families import find_root, let_gradients_through_checkpointed_blocks
from lightning_lora.model.parameter_groups import check_number
from lightning_lora.model.side_effects import freeze_statistics
from lightning_lora.model.spread import class_name
from lightning_lora.model.state import is_merged, named_lora_layers, require_injection
from lightning_lora.model.summary import idle_layers, summary
from lightning_lora.strategies.shared.bitsandbytes_precision import wrap_connectors
from lightning_lora.strategies.shared.refusals import (
    check_adalora,
    check_averaging,
    check_finetuning,
    check_launcher,
    check_readable,
    check_trainer,
)
from lightning_lora.strategies.trainer import lightning_cli
from lightning_lora.strategies.trainer.adapter_of_rows import AdapterOfRows
from lightning_lora.strategies.trainer.adapter_only import AdapterOnly
from lightning_lora.strategies.trainer.adapter_steps import AdapterSteps
from lightning_lora.strategies.trainer.adaptive_ranks import AdaptiveRanks
from lightning_lora.strategies.trainer.adopted import adopt
from lightning_lora.strategies.trainer.learning_rate import check_rates
from lightning_lora.strategies.trainer.starting_point import (
    Start,
    adapt_module,
    check_built_in_time,
    configure_then_adapt,
)


class LoRACallback(AdapterOfRows, AdapterSteps, AdaptiveRanks):
    """Freeze the pretrained model, adapt it with LoRA at ``setup``, and make the run's checkpoints adapter-only.

    The model may be built in ``__init__`` or in ``configure_model``. Checkpoints resume with ``ckpt_path=`` exactly,
    and are refused, before anything is copied, when they are for another base, rank or set of layers.

    Args:
        config: all settings of the adapter in one object, instead of the keyword arguments of the same names.
        module: name of the pretrained model inside the LightningModule, such as ``"model"`` or ``"student.encoder"``.
            ``None`` finds the one transformers model there, or else takes the whole module. What lies outside is left
            as it is: it trains, and is saved, if it requires grad.
        init_from: start from the weights and config of an adapter checkpoint or PEFT directory, local or a URL;
            optimizer, step and epoch start anew. Settings that are given beside it replace the file's, such as
            ``dropout``, and are an error where the file's tensors do not fit them, such as another ``r``. A ``config``
            gives all settings.
        save_peft: write a PEFT directory ``<name>-peft`` beside every checkpoint ``<name>.ckpt``, and remove it with
            it.
        strict_idle: make it an error, not a warning, when adapted layers got no gradient before the first step. Layers
            that ``layerdrop`` may skip are left out of both.
        on_nonfinite: what to do about adapters that hold NaN or infinity, where files are written and read. ``None``
            warns where a checkpoint is written, so that no save ends a run, and refuses to read one. "error" ends a run
            that diverged at its next save, and the former file stays.
        lora_plus_ratio: how many times faster B learns than A in the optimizer that LightningCLI builds from its
            arguments (``--optimizer=AdamW``). In ``configure_optimizers`` write
            :func:`~lightning_lora.parameter_groups` instead.
        quantize: quantise the frozen base before it is adapted, as :func:`~lightning_lora.quantize` does: ``"nf4"``,
            ``"nf4-dq"`` or ``"int8"``. Files do not depend on it: an adapter that was trained over one form of a base
            is read over any other, and a line says so.
        quantize_exclude: modules of the base that are not quantised, by the rules of ``target_modules``. The output
            head and what trains whole never are.
        adapters: several adapters with names on the one base, each with a config of its own, in the place of ``config``
            and its fields. See :func:`~lightning_lora.add_adapter`.
        adapter_key: what every batch calls the adapters of its rows: a list of names or an integer tensor, as
            :func:`~lightning_lora.active` takes it. ``None`` leaves the choice to the module's own steps.
        clip_norm: the largest norm of the gradients of single adapters, by name. ``Trainer(gradient_clip_val=...)``
            clips every adapter by its own norm to the same value.
        accumulate: for single adapters, by name, how many of their optimizer steps are put together to one, with the
            mean of their gradients. A step without rows of an adapter does not count for it.

    Other arguments are the fields of :class:`~lightning_lora.LoRAConfig`. LightningCLI writes all of them into its YAML
    and gives all of them back, so that from there a field at its default counts as not given.

    ``from_pretrained`` gives models in eval mode. Their base layers stay in it, and only the dropout of the adapters is
    switched on when training starts. It has a mode of its own, which ``eval()`` and ``train()`` of any module around a
    layer set too, and which Lightning's validation restores.

    Raises:
        ValueError, TypeError: a setting is wrong (at once), or does not fit the model, strategy or other callbacks (at
            ``setup``, before anything is changed).

    Example::

        trainer = L.Trainer(callbacks=[LoRACallback(r=8)])
        trainer.fit(module, datamodule)
        trainer.fit(module, datamodule, ckpt_path="last")
    """

    def __init__(
        self,
        config: LoRAConfig | None = None,
        *,
        module: str | None = None,
        init_from: str | None = None,
        save_peft: bool = False,
        strict_idle: bool = False,
        on_nonfinite: Literal["error", "warn"] | None = None,
        lora_plus_ratio: float | None = None,
        quantize: Quantization | None = None,
        quantize_exclude: str | Sequence[str] | None = None,
        adapters: dict[str, LoRAConfig] | None = None,
        adapter_key: str | None = None,
        clip_norm: dict[str, float] | None = None,
        accumulate: dict[str, int] | None = None,
        **fields: Any,
    ) -> None:
        if config is not None and not isinstance(config, LoRAConfig):
            if isinstance(config, int):
                raise TypeError(f"config={config!r} must be a LoRAConfig; the rank is r={config!r}")
            remedy = "; write LoRAConfig.from_peft(config)" if hasattr(config, "peft_type") else ""
            raise TypeError(f"config must be a LoRAConfig, got {type(config).__name__}{remedy}")
        own, given = LoRAConfig(**fields), _given(fields)
        if config is not None and given:
            raise ValueError("give either config=LoRAConfig(...) or its fields as keyword arguments, not both")
        self.adapters, self.adapter_key = _by_adapter("adapters", adapters), adapter_key
        _check_adapters(self.adapters, adapter_key, {"config": config, **given})
        self.rates: dict[str, dict[str, float]] = {}  # of a sweep
        self.clip_norm, self.accumulate = _by_adapter("clip_norm", clip_norm), _by_adapter("accumulate", accumulate)
        _check_steps(self.adapters, self.clip_norm, self.accumulate)
        self.config = config or own
        self._given = {n: value for n, value in self.config.to_dict().items() if config is not None or n in given}
        self.module = module
        self.init_from = None if init_from is None else str(init_from)
        self.save_peft = save_peft
        self.strict_idle = strict_idle
        if on_nonfinite not in (None, "error", "warn"):
            raise ValueError(f"on_nonfinite={on_nonfinite!r} is not known; expected 'error', 'warn' or None")
        self.on_nonfinite = on_nonfinite
        if lora_plus_ratio is not None:
            check_number("lora_plus_ratio", lora_plus_ratio)
        self.lora_plus_ratio = lora_plus_ratio
        if quantize is not None:
            check_kind(quantize)
        elif quantize_exclude is not None:
            raise ValueError(f"quantize_exclude={quantize_exclude!r} needs quantize='nf4', 'nf4-dq' or 'int8'")
        self._quantization = {"quantize": quantize, "quantize_exclude": quantize_exclude}
        self._checked: set[int] = set()
        lightning_cli.install(LoRACallback)
        wrap_connectors()

    @property
    @override
    def state_key(self) -> str:
        return f"{type(self).__qualname__}{ {'module': self.module} }"

    @override
    def setup(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        check_trainer(trainer)
        check_averaging(trainer, self)
        check_launcher(trainer, pl_module, self.module)
        for config in (self.config, *self.adapters.values()):
            check_adalora(trainer.strategy, config)
        strategy, own = adopt(trainer.strategy), frozenset((self.module,))
        beside = strategy.peft_beside
        beside.paths = beside.paths | own if self.save_peft else beside.paths - own
        strategy.on_nonfinite = self.on_nonfinite
        self._checked = set()
        start = Start(
            self._given,
            self.module,
            self.init_from,
            self.on_nonfinite or "error",
            self._quantization,
            self.adapters,
            self.rates,
        )
        if is_overridden("configure_model", pl_module):
            # built later, and perhaps by another callback: whoever calls it gets the adapted model
            pl_module.configure_model = functools.partial(  # type: ignore[method-assign]
                configure_then_adapt, pl_module.configure_model, pl_module, start
            )
        else:
            adapt_module(pl_module, start)

    @override
    def teardown(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        self._end()  # of a batch that the loop left out
        pl_module.__dict__.pop("configure_model", None)  # ours, around the class's own

    @override
    def on_exception(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        pl_module.__dict__.pop("configure_model", None)
        lockstep = getattr(trainer.strategy, "lockstep", None)
        if lockstep is not None:
            lockstep.fail(exception)  # before a callback saves on the exception

    @override
    def on_fit_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        path, root = find_root(pl_module, self.module)
        check_built_in_time(root)
        check_finetuning(trainer, pl_module)
        if is_merged(root):
            raise ValueError(
                "the adapters are merged into the base weights and cannot train: call unmerge(model) first"
            )
        for holder in (pl_module, getattr(trainer, "datamodule", None)):
            if holder is not None:
                check_readable(
                    dict(holder.hparams),
                    "the module's hyperparameters hold objects that a safe load of the checkpoint would refuse: keep "
                    "them out with self.save_hyperparameters(ignore=[...])",
                )
        look_for_moved(pl_module)
        let_gradients_through_checkpointed_blocks(root)
        freeze_statistics(root, require_injection(root).trained_whole)  # SyncBatchNorm conversion makes new layers
        rank_zero_info(summary(pl_module, path, root))
        check_rates(trainer, root, self.lora_plus_ratio)
        dropout = max(config.dropout for config in require_injection(root).configs.values())
        if dropout and not all(layer.training for layer in named_lora_layers(root).values()):
            rank_zero_info(
                f"{class_name(root)} is in eval mode, as from_pretrained leaves it: the adapters' dropout of {dropout} "
                "is on, the model's own dropout is off. To have both, call train() on the model"
            )

    @override
    def on_validation_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        if trainer.state.fn != TrainerFn.FITTING:  # a run that trains has said it
            path, root = find_root(pl_module, self.module)
            rank_zero_info(summary(pl_module, path, root))

    on_test_start = on_predict_start = on_validation_start

    @override
    def on_train_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        _, root = find_root(pl_module, self.module)
        require_injection(root).trained_over.clear()  # from here on the adapters train over this base
        for layer in named_lora_layers(root).values():
            layer.start_dropout()  # from_pretrained leaves models in eval mode: it would be off
            # ranks that share a model share its dropout
            layer.lora_salt = getattr(trainer.strategy, "data_parallel_rank", trainer.global_rank)
        super().on_train_start(trainer, pl_module)
        _adopted(trainer).position.begin(trainer)

    @override
    def on_train_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        super().on_train_end(trainer, pl_module)
        _adopted(trainer).position.note_end()

    @override
    def on_train_epoch_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        _adopted(trainer).position.begin_epoch()

    @override
    def on_before_optimizer_step(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", optimizer: Optimizer
    ) -> None:
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        if id(optimizer) in self._checked:
            return
        self._checked.add(id(optimizer))
        _, root = find_root(pl_module, self.module)
        if (message := idle_layers(root, optimizer)) is not None:
            if self.strict_idle:
                raise ValueError(message)
            rank_zero_warn(message)


def _adopted(trainer: "pl.Trainer") -> AdapterOnly:
    assert isinstance(trainer.strategy, AdapterOnly)
    return trainer.strategy


def _by_adapter(option: str, value: Any) -> dict[str, Any]:
    """Return an option that has an entry for each of several adapters, by their names; none for ``None``."""
    if value is not None and not isinstance(value, Mapping):
        raise TypeError(f"{option}={value!r} must have an entry for each adapter, by its name: {option}={{'law': ...}}")
    return dict(value or {})


def _check_adapters(adapters: dict[str, LoRAConfig], adapter_key: str | None, others: dict[str, Any]) -> None:
    """Raise ``ValueError`` or ``TypeError`` for adapters with names that cannot be, or settings beside them."""
    for name, config in adapters.items():
        check_name(name)
        if not isinstance(config, LoRAConfig):
            raise TypeError(f"adapters[{name!r}] must be a LoRAConfig, got {type(config).__name__}")
    beside = [name for name, value in others.items() if value is not None]
    if adapters and beside:
        raise ValueError(f"adapters={list(adapters)} have settings of their own: leave {', '.join(beside)} out")
    if adapter_key is not None and not adapters:
        raise ValueError(
            f"adapter_key={adapter_key!r} chooses among adapters with names: give adapters={{name: config}}"
        )


def _check_steps(adapters: dict[str, LoRAConfig], clip_norm: dict[str, float], accumulate: dict[str, int]) -> None:
    """Raise ``ValueError`` or ``TypeError`` for names that no adapter has, or numbers that cannot be."""
    options: dict[str, Mapping[str, float]] = {"clip_norm": clip_norm, "accumulate": accumulate}
    for option, numbers in options.items():
        unknown = [name for name in numbers if name not in adapters]
        if unknown:
            raise ValueError(f"{option}={numbers!r} has no adapter {unknown[0]!r} to be for: adapters={list(adapters)}")
        for name, number in numbers.items():
            check_number(f"{option}[{name!r}]", number)
    if any(number != int(number) for number in accumulate.values()):
        raise ValueError(f"accumulate={accumulate!r} must have whole numbers of steps")


def _given(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that were given. LightningCLI gives every field: there, one at its default does not count."""
    defaults = {field.name: field.default for field in dataclasses.fields(LoRAConfig)}
    spelled_out = settings.keys() == defaults.keys()
    return {name: value for name, value in settings.items() if not spelled_out or value != defaults[name]}
