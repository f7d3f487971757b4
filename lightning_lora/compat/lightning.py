"""Private names of Lightning: strategies, loops, connectors, LightningCLI."""

import importlib
import sys
from typing import Any

from torch import Tensor

from lightning_lora.compat.lookup import private

_DISTRIBUTED = "lightning.fabric.utilities.distributed"
INSTANTIATOR = "_instantiator"  # key of a checkpoint's hyperparameters: the function that builds its module


def _lightning(owner: Any, name: str) -> Any:
    return private("lightning", owner, name)


def connect(environment: Any, backend: str, **settings: Any) -> None:
    """Make the default process group as Lightning's strategies do. Relies on its function; without it raises."""
    _lightning(_DISTRIBUTED, "_init_dist_connection")(environment, backend, **settings)


def reduce_tensor(tensor: Tensor, group: Any, reduce_op: Any) -> Tensor:
    """Reduce a tensor over a group as Lightning's strategies do. Relies on its function; without it raises."""
    reduced: Tensor = _lightning(_DISTRIBUTED, "_sync_ddp_if_available")(tensor, group, reduce_op=reduce_op)
    return reduced


def gather_tensor(tensor: Tensor, group: Any, sync_grads: bool) -> Tensor:
    """Stack the tensors of a group as Lightning's strategies do. Relies on its function; without it raises."""
    gathered: Tensor = _lightning(_DISTRIBUTED, "_all_gather_ddp_if_available")(tensor, group, sync_grads)
    return gathered


def subprocess_launcher(strategy: type) -> Any:
    """Return the launcher of one process per device for a class of Fabric or Trainer. Relies on it; else raises."""
    side = "pytorch" if strategy.__module__.startswith("lightning.pytorch") else "fabric"
    return _lightning(f"lightning.{side}.strategies.launchers.subprocess_script", "_SubprocessScriptLauncher")


def set_launcher(strategy: Any, launcher: Any) -> None:
    """Give a strategy its launcher. Relies on the attribute behind ``launcher``."""
    strategy._launcher = launcher


def set_backward_sync(strategy: Any, control: Any) -> None:
    """Give a strategy of Fabric what answers ``no_backward_sync``. Relies on its attribute; without it raises."""
    _lightning(strategy, "_backward_sync_control")
    strategy._backward_sync_control = control


def set_device_mesh(module: Any, mesh: Any) -> None:
    """Give a LightningModule the mesh that its ``device_mesh`` returns. Relies on its attribute; without it raises."""
    _lightning(module, "_device_mesh")
    module._device_mesh = mesh


def is_forking(launcher: Any) -> bool:
    """Whether a Trainer's launcher runs fit in forked or spawned processes. Relies on its class; without it raises."""
    base = _lightning("lightning.pytorch.strategies.launchers.multiprocessing", "_MultiProcessingLauncher")
    return isinstance(launcher, base)


def ddp_options(strategy: Any) -> dict[str, Any]:
    """Return the arguments that a strategy will give DDP, to change. Relies on its attribute; without it raises."""
    options: dict[str, Any] = _lightning(strategy, "_ddp_kwargs")
    return options


def has_communication_hook(strategy: Any) -> bool:
    """Whether a DDP strategy has a hook of the user's. Relies on its attribute; without it there is none."""
    return getattr(strategy, "_ddp_comm_hook", None) is not None


def unwrapped(value: Any) -> Any:
    """Return what ``Fabric.setup`` wrapped, in containers too. Relies on Fabric's function; without it raises."""
    return _lightning("lightning.fabric.wrappers", "_unwrap_objects")(value)


def set_epoch(dataloader: Any, epoch: int) -> None:
    """Tell a dataloader's samplers the epoch. Relies on Lightning's function; without it raises."""
    _lightning("lightning.fabric.utilities.data", "_set_sampler_epoch")(dataloader, epoch)


def train_loader(trainer: Any) -> Any:
    """Return the loader that holds a fit's dataloaders, or ``None`` before a fit. Relies on the loop; else raises."""
    return _lightning(trainer.fit_loop, "_combined_loader")


def loader_states(combined: Any) -> list[dict[str, Any]]:
    """Return the positions of a fit's dataloaders. Relies on the combined loader's method; without it raises."""
    states: list[dict[str, Any]] = _lightning(combined, "_state_dicts")()
    return states


def signal_connector_class() -> Any:
    """Return the class of Lightning's signal handlers, to replace two of them. Relies on both; without them raises."""
    connector = _lightning("lightning.pytorch.trainer.connectors.signal_connector", "_SignalConnector")
    for name in ("_sigterm_notifier_fn", "_slurm_sigusr_handler_fn"):
        _lightning(connector, name)
    return connector


def set_signal_connector(trainer: Any, connector: Any) -> None:
    """Replace a Trainer's signal handlers. Relies on its attribute; without it raises."""
    _lightning(trainer, "_signal_connector")
    trainer._signal_connector = connector


def requeue(connector: Any, signal: Any) -> None:
    """Let Lightning's own handler save for SLURM and requeue the job. Relies on its method; without it raises."""
    _lightning(signal_connector_class(), "_slurm_sigusr_handler_fn")(connector, signal, None)  # it reads no frame


def silence_sigterm_broadcast(epoch_loop: Any) -> None:
    """Let a loop broadcast no signal before a batch. Relies on its method; a Lightning without one broadcasts none."""
    epoch_loop._broadcast_sigterm_tensor = lambda: None


def accumulates(epoch_loop: Any) -> bool:
    """Whether the batch before was accumulated without a step. Relies on the loop's method; without it raises."""
    return bool(_lightning(epoch_loop, "_should_accumulate")())


def validates_next(epoch_loop: Any, data_fetcher: Any) -> bool:
    """Whether a validation follows the batch before. Relies on the loop's method; without it raises."""
    return bool(_lightning(epoch_loop, "_should_check_val_fx")(data_fetcher))


def has_no_more_batches(epoch_loop: Any) -> bool:
    """Whether an epoch has no more batches. Relies on the loop's method; without it raises."""
    return bool(_lightning(epoch_loop, "_num_ready_batches_reached")())


def clear_restarting(loop: Any) -> None:
    """Let a fit's loop begin anew, past its own setter. Relies on the setter of all loops; without it raises."""
    _lightning("lightning.pytorch.loops.loop", "_Loop").restarting.fset(loop, False)


def uncount_batch(epoch_loop: Any) -> None:
    """Take back one batch that stepped. Relies on the loop's count; without it raises."""
    epoch_loop._batches_that_stepped = _lightning(epoch_loop, "_batches_that_stepped") - 1


def uncount_saved_batch(fit_loop: dict[str, Any]) -> None:
    """Take back one batch that stepped in a file's state of the fit loop. Relies on the key of the count."""
    fit_loop["epoch_loop.state_dict"]["_batches_that_stepped"] -= 1


def outputs_method(loop: Any) -> str | None:
    """Return the method that ends an evaluation's dataloader. Relies on its name; loops of prediction have none."""
    name = "_store_dataloader_outputs"
    return name if hasattr(loop, name) else None


def dump_checkpoint(trainer: Any, weights_only: bool | None) -> dict[str, Any]:
    """Return the checkpoint that a Trainer would write. Relies on its connector; without it raises."""
    checkpoint: dict[str, Any] = _lightning(trainer, "_checkpoint_connector").dump_checkpoint(weights_only)
    return checkpoint


def loaded_checkpoint(connector: Any) -> dict[str, Any]:
    """Return the file that a Trainer's connector has read, or an empty one. Relies on its attribute; else raises."""
    return _lightning(connector, "_loaded_checkpoint") or {}


def place_of_load_state() -> tuple[Any, str]:
    """Return where ``load_from_checkpoint`` finds the function that builds and fills a module."""
    return _place("lightning.pytorch.core.saving", "_load_state")


def place_of_restore_model() -> tuple[Any, str]:
    """Return where a Trainer finds the method that fills its module from a file."""
    connector = _lightning("lightning.pytorch.trainer.connectors.checkpoint_connector", "_CheckpointConnector")
    return _place(connector, "restore_model")


def place_of_cli_optimizer() -> tuple[Any, str] | None:
    """Return where LightningCLI finds the method that builds its optimizer; ``None`` if it is not imported."""
    module = sys.modules.get("lightning.pytorch.cli")  # importing it takes longer than all of lightning_lora
    return None if module is None else _place(module.LightningCLI, "_add_configure_optimizers_method_to_model")


def connectors() -> list[Any]:
    """Return the classes by which Trainer and Fabric check their arguments. Relies on both; without one raises."""
    return [
        _lightning("lightning.pytorch.trainer.connectors.accelerator_connector", "_AcceleratorConnector"),
        _lightning("lightning.fabric.connector", "_Connector"),
    ]


def _place(owner: Any, name: str) -> tuple[Any, str]:
    """Return an owner and a name in it for ``getattr`` and ``setattr``. Without the name raises."""
    _lightning(owner, name)
    return importlib.import_module(owner) if isinstance(owner, str) else owner, name


def allowed_instantiators() -> set[str] | None:
    """Return the functions that a file may name to build its module. Before 2.6.6 Lightning allows all: ``None``."""
    from lightning.pytorch.core import saving

    return getattr(saving, "_ALLOWED_INSTANTIATORS", None)


def cli_callbacks(cli: Any) -> list[Any]:
    """Return the callbacks that a command line will give its Trainer. Relies on LightningCLI's; without it raises."""
    get, parser = _lightning(cli, "_get"), _lightning(cli, "_parser")
    given = get(cli.config_init, "trainer", default={}).get("callbacks")
    own = [get(cli.config_init, key) for key in parser(cli.subcommand).callback_keys]
    sources = (given, cli.trainer_defaults.get("callbacks"), own)
    return [callback for one in sources for callback in (one if isinstance(one, list) else [one])]


def cli_optimizer_settings(cli: Any, subcommand: str | None) -> dict[str, Any]:
    """Return the arguments that a command line gives its one optimizer. Relies on LightningCLI's; else raises."""
    registered = _lightning(_lightning(cli, "_parser")(subcommand), "_optimizers")
    given = [
        _lightning(cli, "_get")(cli.config_init, key) for key, (_, link) in registered.items() if link == "AUTOMATIC"
    ]
    return dict(vars(given[0].get("init_args", given[0])))
