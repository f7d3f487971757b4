"""Refuse a checkpoint with adapters in a Trainer that has no ``LoRACallback``, and say which callback to add.

Without it Lightning lists every base weight as missing, or drops the adapters where ``strict_loading`` is off. The
check is wrapped around the Trainer's own method at import: no callback is there that could check, and without one no
model is adapted before the file is read.
"""

import functools
from typing import Any

from torch import nn

from lightning_lora.checkpoint.file import SECTION
from lightning_lora.compat.lightning import loaded_checkpoint, place_of_restore_model
from lightning_lora.config import LoRAConfig, brief
from lightning_lora.model.families import find_root
from lightning_lora.model.state import injected_roots
from lightning_lora.model.wrapping import at_injection, wrap


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
