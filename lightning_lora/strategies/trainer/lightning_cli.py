"""Let ``LightningCLI --optimizer=...`` build the optimizer after the model has its adapters.

LightningCLI builds the optimizer that its arguments describe from ``model.parameters()`` before the Trainer runs, when
no adapters are there, and a model of ``configure_model`` has no parameters at all. ``LoRACallback`` calls
:func:`install`: a command line makes its callbacks before that optimizer.
"""

import contextlib
import copy
import functools
import warnings
from types import MethodType
from typing import Any

from lightning_lora.compat.lightning import cli_callbacks, cli_optimizer_settings, place_of_cli_optimizer
from lightning_lora.model.wrapping import wrap
from lightning_lora.strategies.trainer.learning_rate import handing_out_groups


def install(callback: Any) -> None:
    """Wrap the method that builds the optimizer, where LightningCLI is imported; a second call does nothing.

    Args:
        callback: the class of callbacks that put adapters into a model.
    """
    place = place_of_cli_optimizer()
    if place is not None:
        wrap(*place, functools.partial(_building_late, callback=callback))


def _building_late(add: Any, callback: Any) -> Any:
    """Wrap the method so that the model's ``configure_optimizers`` builds the optimizer when the run calls it."""

    @functools.wraps(add)
    def adding(cli: Any, subcommand: str | None) -> None:
        ratios = [one.lora_plus_ratio for one in cli_callbacks(cli) if isinstance(one, callback)]
        if not ratios:
            add(cli, subcommand)
            return
        # it may fail without adapters; a real error is raised when it is built late
        with contextlib.suppress(Exception):
            add(cli, subcommand)
            if "configure_optimizers" not in vars(cli.model):
                return  # the arguments describe no optimizer

        @functools.wraps(cli.configure_optimizers)  # by which Lightning sees that the method is overridden
        def configure_optimizers(module: Any) -> Any:
            late = module.configure_optimizers
            del module.configure_optimizers
            twin = copy.copy(cli)
            twin.model = module
            try:
                settings = functools.partial(cli_optimizer_settings, cli, subcommand)
                with warnings.catch_warnings(), handing_out_groups(module, ratios, settings):
                    warnings.filterwarnings("ignore", ".*will be overridden by")  # said once before
                    add(twin, subcommand)
                return module.configure_optimizers()
            finally:
                module.configure_optimizers = late

        cli.model.configure_optimizers = MethodType(configure_optimizers, cli.model)

    return adding
