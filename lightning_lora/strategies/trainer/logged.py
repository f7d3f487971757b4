"""Log the settings and sizes of the adapters in the same call as Lightning's own hyperparameters.

Some loggers keep one call of ``log_hyperparams`` alone, or refuse a key's second value. So the methods of a run's
logger objects are wrapped until Lightning has called them.
"""

from argparse import Namespace
from typing import Any

import lightning.pytorch as pl

from lightning_lora.model.summary import hyperparameters

_WRAPPED = ("log_hyperparams", "log_graph")


def log_adapters(trainer: "pl.Trainer") -> None:
    """Make each logger of a run add the adapters' hyperparameters to those that Lightning logs. Called at ``setup``.

    Lightning calls ``log_hyperparams``, if there are any, and then ``log_graph``.
    """
    for logger in trainer.loggers if getattr(trainer, "enable_autolog_hparams", True) else ():
        for name in _WRAPPED:
            vars(logger).pop(name, None)  # of a run that failed before it logged
        _Logged(logger, trainer)


class _Logged:
    """Stands before the methods of one logger until Lightning has logged its hyperparameters."""

    def __init__(self, logger: Any, trainer: "pl.Trainer") -> None:
        self._logger, self._trainer = logger, trainer
        self._is_told = False
        self._methods = {name: getattr(logger, name) for name in _WRAPPED}
        for name in _WRAPPED:
            setattr(logger, name, getattr(self, name))

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        self._is_told = True
        found = vars(params) if isinstance(params, Namespace) else params
        ours = hyperparameters(self._trainer.lightning_module)
        self._methods["log_hyperparams"]({**found, **ours}, *args, **kwargs)

    def log_graph(self, *args: Any, **kwargs: Any) -> None:
        if not self._is_told:
            self.log_hyperparams({})
        for name in _WRAPPED:
            vars(self._logger).pop(name, None)
        self._methods["log_graph"](*args, **kwargs)
