"""The places where Lightning itself has to know about adapters and offers no hook.

Importing the package registers ``"fsdp_lora"`` and ``"megatron_lora"`` with Trainer and Fabric, and wraps:

- Fabric's ``setup``, ``setup_module``, ``save``, ``load`` and ``load_raw``, which no callback can reach in time;
- the function behind ``LightningModule.load_from_checkpoint``, which would drop adapters with a warning at most;
- the method that restores a Trainer's model, which without the callback would list every base weight as missing;
- the function that logs hyperparameters.

Each wrapper looks for adapters first and runs Lightning's own code where there are none.
"""

import functools
import importlib
from contextvars import ContextVar
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
from lightning.fabric import Fabric
from lightning.fabric.strategies import STRATEGY_REGISTRY
from lightning.pytorch.strategies import StrategyRegistry
from torch import nn

from lightning_lora.checkpoint.file import (
    SECTION,
    check_tensors,
    complete_state,
    fitting_tensors,
    read_checkpoint,
    section_of,
)
from lightning_lora.compat.lightning import (
    INSTANTIATOR,
    allowed_instantiators,
    loaded_checkpoint,
    place_of_load_state,
    place_of_log_hyperparams,
    place_of_restore_model,
    unwrapped,
)
from lightning_lora.config import LoRAConfig, brief
from lightning_lora.fabric import FSDPLoRAStrategy as FabricFSDPLoRAStrategy
from lightning_lora.fabric import MegatronLoRAStrategy as FabricMegatronLoRAStrategy
from lightning_lora.model.inject import inject, inject_anew
from lightning_lora.model.root import find_root
from lightning_lora.model.state import injected_roots, injection_of
from lightning_lora.model.summary import hyperparameters
from lightning_lora.strategies.adapter_only import AdapterOnly
from lightning_lora.strategies.fabric import adapted_modules, adopt_fabric
from lightning_lora.strategies.fsdp import FSDPLoRAStrategy
from lightning_lora.strategies.megatron import MegatronLoRAStrategy

_INSTANTIATOR = f"{__name__}.instantiate"
_file_instantiator: ContextVar[str | None] = ContextVar("_file_instantiator", default=None)


def install() -> None:
    """Wrap the methods and register the strategies' names; a second call does nothing."""
    in_shards = "the frozen base sharded with FSDP2, adapters whole, adapter-only checkpoints"
    split = "the base split over tensor-parallel ranks by its plan, adapter-only checkpoints"
    for name, description, strategy, twin in (
        ("fsdp_lora", in_shards, FSDPLoRAStrategy, FabricFSDPLoRAStrategy),
        ("megatron_lora", split, MegatronLoRAStrategy, FabricMegatronLoRAStrategy),
    ):
        for registry, registered in ((StrategyRegistry, strategy), (STRATEGY_REGISTRY, twin)):
            if name not in registry:
                registry.register(name, registered, description=description)
    for name in ("setup", "setup_module", "save", "load", "load_raw"):
        method = getattr(Fabric, name)
        if not hasattr(method, "knows_adapters"):
            setattr(Fabric, name, _adopting(method))
    for place, wrap in (
        (place_of_load_state(), _adapting),
        (place_of_log_hyperparams(), _logging_adapters),
        (place_of_restore_model(), _restoring),
    ):
        if not hasattr(getattr(*place), "knows_adapters"):
            setattr(*place, wrap(getattr(*place)))
    allowed = allowed_instantiators()
    if allowed is not None:
        allowed.add(_INSTANTIATOR)


def _adopting(method: Any) -> Any:
    """Return a method of Fabric that adopts the strategy first, if any of its arguments has adapters."""

    @functools.wraps(method)
    def adopting(self: Fabric, *args: Any, **kwargs: Any) -> Any:
        if any(_has_adapters(unwrapped(value)) for value in (*args, *kwargs.values())):
            adopt_fabric(self.strategy)
        if getattr(self.strategy, "shards", False) and method.__name__ in ("setup", "setup_module"):
            module = args[0] if args else kwargs["module"]
            if any(parameter.is_meta for parameter in module.parameters()):
                kwargs.setdefault("move_to_device", False)  # the strategy does it, and Fabric would warn
        if method.__name__ == "save":
            _check_top_level(args[1] if len(args) > 1 else kwargs.get("state"))
        if method.__name__ in ("load", "load_raw"):
            return _loaded(functools.partial(method, self), *args, **kwargs)
        return method(self, *args, **kwargs)

    adopting.knows_adapters = True  # type: ignore[attr-defined]
    return adopting


def _loaded(load: Any, *args: Any, **kwargs: Any) -> Any:
    """Load a file; raise an error that says what to do if it holds adapters and no model in the state does."""
    path, state, *_ = (*args, *(kwargs[name] for name in ("path", "state", "obj") if name in kwargs), None, None)
    holders = list(state.values()) if isinstance(state, dict) else [state]
    is_bare = any(isinstance(one, nn.Module) for one in holders) and not any(map(_has_adapters, holders))
    advice = f"{path} holds adapters, and no model in the state has any: call inject(model, config) before fabric.setup"
    try:
        result = load(*args, **kwargs)
    except Exception:
        if is_bare and _holds_adapters(path):
            raise ValueError(advice) from None  # Lightning's lists every base weight as missing
        raise
    # not strict, Lightning drops the adapters; load_raw does not give back what is left
    if is_bare and (
        SECTION in result if result is not None else not kwargs.get("strict", True) and _holds_adapters(path)
    ):
        raise ValueError(advice)
    return result


def _holds_adapters(path: Any) -> bool:
    try:
        return SECTION in read_checkpoint(path)
    except (OSError, ValueError):
        return False


def _restoring(restore_model: Any) -> Any:
    """Return the Trainer's ``restore_model`` that refuses a file with adapters for a module without any."""

    @functools.wraps(restore_model)
    def restoring(self: Any) -> None:
        try:
            restore_model(self)
        except RuntimeError:
            _check_not_bare(self)
            raise
        _check_not_bare(self)  # strict_loading=False drops the adapters

    restoring.knows_adapters = True  # type: ignore[attr-defined]
    return restoring


def _check_not_bare(connector: Any) -> None:
    """Raise ``ValueError`` where a Trainer's checkpoint holds adapters, and its module none that take them."""
    trainer, section = connector.trainer, loaded_checkpoint(connector).get(SECTION)
    if section is None or injected_roots(trainer.lightning_module):
        return
    callbacks = ", ".join(_callback_of(adapter, trainer.lightning_module) for adapter in section["adapters"])
    raise ValueError(
        f"{trainer.ckpt_path} holds adapters, and the Trainer has no LoRACallback to put them into "
        f"{type(trainer.lightning_module).__name__}: write Trainer(callbacks=[{callbacks}, ...])"
    ) from None


def _callback_of(adapter: Any, module: nn.Module) -> str:
    """Return the ``LoRACallback(...)`` that an adapter of a file needs, with the settings that are not defaults."""
    defaults = LoRAConfig().to_dict()
    settings = {name: value for name, value in adapter["config"].items() if value != defaults.get(name)}
    try:
        found, _ = find_root(module)
    except ValueError:
        found = None
    if found != adapter["root"]:
        settings["module"] = adapter["root"]
    return f"LoRACallback({', '.join(f'{name}={brief(value)}' for name, value in settings.items())})"


def _check_top_level(state: Any) -> None:
    """Raise ``ValueError`` for an adapted model inside a nested container, which Fabric would pickle with its base."""
    for key, value in state.items() if isinstance(state, dict) else ():
        inner = list(value.values()) if isinstance(value, dict) else value
        if isinstance(inner, (list, tuple)) and any(_has_adapters(unwrapped(one)) for one in inner):
            raise ValueError(
                f"state[{key!r}] holds an adapted model inside a container: put it at the top of the state"
            )


def _has_adapters(value: Any) -> bool:
    return bool(injected_roots(value) if isinstance(value, nn.Module) else adapted_modules(value))


def _logging_adapters(log_hyperparams: Any) -> Any:
    """Return Lightning's ``_log_hyperparams(trainer)``, which logs the adapters' hyperparameters in the same call.

    Some loggers keep one call alone, or refuse a key's second value.
    """

    @functools.wraps(log_hyperparams)
    def logging(run: Any) -> None:
        if not isinstance(run.strategy, AdapterOnly):
            log_hyperparams(run)
            return
        ours = hyperparameters(run.lightning_module)
        loggers = [_Adding(logger, ours) for logger in run.loggers]
        log_hyperparams(
            SimpleNamespace(lightning_module=run.lightning_module, datamodule=run.datamodule, loggers=loggers)
        )

    logging.knows_adapters = True  # type: ignore[attr-defined]
    return logging


class _Adding:
    """Stands in for a logger, and adds the adapters' hyperparameters to those that Lightning found, if any."""

    def __init__(self, logger: Any, ours: dict[str, Any]) -> None:
        self.logger, self.values = logger, ours

    def log_hyperparams(self, params: dict[str, Any]) -> None:
        self.values = {**params, **self.values}

    def log_graph(self, module: pl.LightningModule) -> None:
        self.logger.log_hyperparams(self.values)
        self.logger.log_graph(module)

    def save(self) -> None:
        self.logger.save()


def _adapting(load_state: Any) -> Any:
    """Return Lightning's ``_load_state(cls, checkpoint, ...)`` that adapts the new module if the file has adapters."""

    @functools.wraps(load_state)
    def adapting(cls: type, checkpoint: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if SECTION not in checkpoint or not issubclass(cls, pl.LightningModule):
            return load_state(cls, checkpoint, *args, **kwargs)
        own = checkpoint.get(cls.CHECKPOINT_HYPER_PARAMS_KEY, {}).get(INSTANTIATOR)
        allowed = allowed_instantiators()
        if own is not None and allowed is None:
            raise ValueError(
                f"the checkpoint names the function that builds its module, {own!r}, and lightning {pl.__version__} "
                "would run any function that a file names: pip install 'lightning>=2.6.6', which runs LightningCLI's"
            )
        if own is None or own in (allowed or ()):  # any other is for Lightning to refuse
            kwargs[INSTANTIATOR] = _INSTANTIATOR
        token = _file_instantiator.set(own)
        try:
            module = load_state(cls, dict(checkpoint), *args, **kwargs)
        finally:
            _file_instantiator.reset(token)
        if not injected_roots(module):
            raise ValueError(f"the checkpoint holds adapters, and {cls.__name__} was built without loading them")
        return module

    adapting.knows_adapters = True  # type: ignore[attr-defined]
    return adapting


def instantiate(cls: type, arguments: dict[str, Any]) -> Any:
    """Build a module as its file says, and let it take the file's adapters before it is given the file's state.

    Lightning builds what ``load_from_checkpoint`` returns by the function that ``_instantiator`` names: LightningCLI's,
    or none. This one stands in for both.
    """
    path = _file_instantiator.get()
    if path is None:
        module = cls(**arguments)
    else:
        package, _, name = path.rpartition(".")
        module = getattr(importlib.import_module(package), name)(cls, arguments)
    if isinstance(module, pl.LightningModule):
        # on_load_checkpoint is the one moment between building the module and loading its state
        module.on_load_checkpoint = functools.partial(_adapt, module, vars(module).get("on_load_checkpoint"))  # type: ignore[method-assign]
    return module


def _adapt(module: pl.LightningModule, own_hook: Any, checkpoint: dict[str, Any]) -> None:
    """Stand in for a new module's ``on_load_checkpoint``: adapt it, call the user's own, and complete the state."""
    del module.on_load_checkpoint
    if own_hook is not None:  # of the instance, not of its class
        module.on_load_checkpoint = own_hook  # type: ignore[method-assign]
    source = "the checkpoint"
    for adapter in section_of(checkpoint, source)["adapters"]:
        root, config = _root_named(module, adapter["root"]), LoRAConfig.from_dict(adapter["config"])
        if injection_of(root) is None:  # PEFT makes ranks above a layer's size too, which inject refuses
            inject_anew(root, config, check_ranks=False)
        else:
            inject(root, config)  # an error where it was adapted otherwise
    # names and shapes are checked after the user's hook, which may put back what its twin changed
    checkpoint["state_dict"] = fitting_tensors(checkpoint, module, source, check_names=False)
    module.on_load_checkpoint(checkpoint)
    check_tensors(checkpoint["state_dict"], module, source)
    checkpoint["state_dict"] = complete_state(checkpoint["state_dict"], module)


def _root_named(module: pl.LightningModule, name: str) -> nn.Module:
    try:
        return module.get_submodule(name)
    except AttributeError:
        raise ValueError(
            f"the checkpoint holds adapters for the model at {name!r}, and {type(module).__name__} has no module of "
            "that name once it is built: build the pretrained model in __init__, under the name it had in training"
        ) from None
