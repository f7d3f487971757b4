"""Refuse trainers, strategies, callbacks, files and models that adapter-only runs do not serve, and say what to use."""

import inspect
import io
import pickle
from collections import OrderedDict
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, Callback, StochasticWeightAveraging, WeightAveraging
from torch import Tensor, nn

from lightning_lora.compat.lightning import is_forking
from lightning_lora.config import LoRAConfig
from lightning_lora.layers.quantized_model import is_quantised
from lightning_lora.model.families import find_root
from lightning_lora.model.names import clean_name
from lightning_lora.model.state import injected_roots, injection_of
from lightning_lora.ops.sharded import is_sharded
from lightning_lora.strategies.shared.bitsandbytes_precision import check_precision


def check_served(strategy: object, served: tuple[type[Any], ...]) -> None:
    """Raise ``ValueError`` for a strategy that cannot keep adapter checkpoints exact."""
    is_deepspeed = any(cls.__name__ == "DeepSpeedStrategy" for cls in type(strategy).__mro__)  # derived from DDP's
    if not isinstance(strategy, served) or is_deepspeed:
        raise ValueError(
            f"{type(strategy).__name__} is not supported: its checkpoints would hold the base or lose the adapters. "
            "Use strategy='auto' or 'ddp' (every rank holds the frozen base, and only the adapters' gradients are "
            "exchanged), or 'fsdp_lora' (each rank holds its share of the base)"
        )


def check_reader(checkpoint_io: Any) -> None:
    """Raise ``ValueError`` for a ``CheckpointIO`` of the user's that cannot be told to read without running code."""
    parameters = inspect.signature(checkpoint_io.load_checkpoint).parameters.values()
    if not any(p.name == "weights_only" or p.kind is p.VAR_KEYWORD for p in parameters):
        raise ValueError(
            f"{type(checkpoint_io).__name__}.load_checkpoint takes no weights_only argument, so that its files could "
            "not be read back safely: add `weights_only=None` to it and hand it to torch.load"
        )


def check_readable(content: dict[str, Any], problem: str) -> None:
    """Raise ``ValueError`` for objects that a safe load would refuse, before a file holds them.

    Args:
        problem: begins the error: where the objects come from, and how to leave them out.
    """
    buffer = io.BytesIO()
    torch.save(_without_values(content), buffer)
    buffer.seek(0)
    try:
        torch.load(buffer, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{problem}, or allow their class with torch.serialization.add_safe_globals. {error}"
        ) from error


def _without_values(content: Any) -> Any:
    """Return nested plain containers with empty tensors in place of plain tensors, which every load accepts."""
    if type(content) in (Tensor, nn.Parameter):
        return content.new_empty(0)
    if type(content) in (dict, OrderedDict):
        return type(content)((key, _without_values(value)) for key, value in content.items())
    if type(content) in (list, tuple):
        return type(content)(map(_without_values, content))
    return content


def check_whole(model: nn.Module, strategy: str) -> None:
    """Raise ``ValueError`` for a model that another strategy left in shards."""
    if any(is_sharded(parameter) for parameter in model.parameters()):
        raise ValueError(
            f"the model is in shards, from a run with 'fsdp_lora', and {strategy} wants it whole: build it anew and "
            "give ckpt_path= or init_from=, or go on with 'fsdp_lora'"
        )


def check_has_values(model: nn.Module, strategy: str) -> None:
    """Raise ``ValueError`` for an adapted model on the meta device, under a strategy that does not fill it."""
    name = first_on_meta(model)
    if name is not None and injected_roots(model):
        raise ValueError(
            f"{name!r} is on the meta device, and {strategy} has nothing to fill it from: build the model with its "
            "weights, as from_pretrained does, or use 'fsdp_lora', which reads them by base_weights="
        )


def first_on_meta(model: nn.Module) -> str | None:
    """Return the name of a tensor without values, if there is one."""
    named = (*model.named_parameters(), *model.named_buffers())
    return next((clean_name(name) for name, tensor in named if tensor.device.type == "meta"), None)


def check_trainer(trainer: "pl.Trainer") -> None:
    """Raise ``TypeError`` for a Trainer of another package, ``ValueError`` for a precision that replaces layers."""
    if not isinstance(trainer, pl.Trainer):
        raise TypeError(
            f"the Trainer is {type(trainer).__module__}.{type(trainer).__qualname__}; lightning_lora works with the "
            "package lightning: write `import lightning.pytorch as pl` instead of `import pytorch_lightning as pl`"
        )
    precision = type(trainer.precision_plugin).__name__
    check_precision(trainer.strategy, trainer.precision_plugin)
    if precision == "TransformerEnginePrecision":
        raise ValueError(
            f"{precision} replaces the linear layers that adapters sit in and is not supported. Use "
            'precision="bf16-true" for a frozen base in half the memory, or "bf16-mixed"'
        )


def check_adalora(strategy: Any, config: LoRAConfig) -> None:
    """Raise ``ValueError`` for AdaLoRA under a strategy that splits factors, whose ranks are scored as a whole."""
    if config.adalora is not None and getattr(strategy, "splits_adapters", False):
        raise ValueError(
            f"AdaLoRA scores whole factors, and {type(strategy).__name__} spreads them over ranks "
            "(tensor parallelism, or shard_adapters=True): use 'ddp', or 'fsdp_lora' with shard_adapters=False, or "
            "leave adalora out"
        )


def check_averaging(trainer: "pl.Trainer", lora_callback: Callback) -> None:
    """Raise ``ValueError`` for callbacks that copy the model where it is sharded, or before it is adapted."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector
    averaging = [one for one in callbacks if isinstance(one, (WeightAveraging, StochasticWeightAveraging))]
    if averaging and getattr(trainer.strategy, "shards", False):
        raise ValueError(
            f"{type(averaging[0]).__name__} copies the whole model, which no rank holds under "
            f"{type(trainer.strategy).__name__}: use it with strategy='ddp', or leave it out"
        )
    for callback in callbacks[: callbacks.index(lora_callback)] if lora_callback in callbacks else callbacks:
        if callback in averaging:
            name = type(callback).__name__
            raise ValueError(
                f"{name} copies the model at setup, before LoRACallback adapts it: list LoRACallback before {name}"
            )


def check_finetuning(trainer: "pl.Trainer", pl_module: Any) -> None:
    """Raise ``ValueError`` for a callback that will unfreeze a base in 4 or 8 bits in the middle of the run."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector
    for callback in callbacks:
        if isinstance(callback, BackboneFinetuning) and is_quantised(pl_module.backbone):
            raise ValueError(
                f"{type(callback).__name__} unfreezes module.backbone in epoch {callback.unfreeze_backbone_at_epoch}, "
                "and it holds weights in 4 or 8 bits, which cannot train: leave the callback out, or quantize="
            )


def check_launcher(trainer: "pl.Trainer", pl_module: nn.Module, path: str | None) -> None:
    """Raise ``ValueError`` where fit runs in processes of its own, from which a bare model would come back bare."""
    if is_forking(trainer.strategy.launcher):
        _, root = find_root(pl_module, path)
        if injection_of(root) is None:
            raise ValueError(
                "this strategy runs fit in forked or spawned processes, and the model in this script's process would "
                "come back without adapters. Use strategy='ddp', or adapt it before fit with the callback's settings: "
                "inject(model, LoRAConfig(...))"
            )
