"""Read checkpoints with adapters where no ``LoRACallback`` takes them in.

Importing ``lightning_lora`` wraps the functions that read files: a script may load one before it calls anything else,
and then no model is adapted and no callback is there that could check. ``MyModule.load_from_checkpoint(path)`` adapts
the new module if the file holds adapters, where Lightning's own function would fail on the missing base weights or drop
the adapters. A Trainer without the callback refuses the file and says which one to add, where Lightning would list
every base weight as missing, or drop the adapters where ``strict_loading`` is off. For files without adapters
Lightning's code runs alone.
"""

import functools
import importlib
from contextvars import ContextVar
from typing import Any

import lightning.pytorch as pl
from torch import nn

from lightning_lora.checkpoint.file import SECTION
from lightning_lora.checkpoint.fitting import check_tensors, complete_state, fitting_tensors
from lightning_lora.checkpoint.reading import name_of, section_of
from lightning_lora.compat.lightning import (
    INSTANTIATOR,
    allowed_instantiators,
    loaded_checkpoint,
    place_of_load_state,
    place_of_restore_model,
)
from lightning_lora.config import LoRAConfig, brief
from lightning_lora.model.adapters import adapt_anew, add_adapter
from lightning_lora.model.families import find_root
from lightning_lora.model.inject import inject
from lightning_lora.model.state import injected_roots, injection_of
from lightning_lora.model.wrapping import at_injection, wrap

_INSTANTIATOR = f"{__name__}.instantiate"
_file_instantiator: ContextVar[str | None] = ContextVar("_file_instantiator", default=None)


def wrap_load_from_checkpoint() -> None:
    """Wrap the function behind ``load_from_checkpoint``; a second call does nothing."""
    wrap(*place_of_load_state(), _adapting)


def _adapting(load_state: Any) -> Any:
    """Return Lightning's function ``(cls, checkpoint, ...)`` that adapts the new module if the file has adapters."""

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
        if allowed is not None:  # before 2.6.6 Lightning allows all
            allowed.add(_INSTANTIATOR)
        token = _file_instantiator.set(own)
        try:
            module = load_state(cls, dict(checkpoint), *args, **kwargs)
        finally:
            _file_instantiator.reset(token)
            if allowed is not None:
                allowed.discard(_INSTANTIATOR)
        if not injected_roots(module):
            raise ValueError(f"the checkpoint holds adapters, and {cls.__name__} was built without loading them")
        return module

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
    for entry in section_of(checkpoint, source)["adapters"]:
        root, config, name = _root_named(module, entry["root"]), LoRAConfig.from_dict(entry["config"]), name_of(entry)
        injection = injection_of(root)
        if injection is None or (name and injection.named and name not in injection.named):
            adapt_anew(root, name, config)
        elif name:
            add_adapter(root, name, config)  # an error where it was adapted otherwise
        else:
            inject(root, config)
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


@at_injection
def wrap_restore_model() -> None:
    """Make the Trainer check that its module takes the adapters of a checkpoint."""
    wrap(*place_of_restore_model(), _restoring)


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
