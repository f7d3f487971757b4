"""Adapt the pretrained model inside a LightningModule as ``LoRACallback`` was told: anew, or from a file."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lightning.fabric.utilities.rank_zero import rank_zero_info
from torch import nn

from lightning_lora.checkpoint.file import adapter_checkpoint
from lightning_lora.checkpoint.fitting import copy_tensors, fitting_tensors
from lightning_lora.checkpoint.reading import adapters_at, read_checkpoint
from lightning_lora.checkpoint.storage import location
from lightning_lora.config import LoRAConfig
from lightning_lora.model.adapters import adapt_anew, add_adapter
from lightning_lora.model.families import family_of, find_root
from lightning_lora.model.inject import inject, inject_anew, remove
from lightning_lora.model.names import clean_name
from lightning_lora.model.quantize import quantize_once
from lightning_lora.model.state import OnNonfinite, has_trained, injection_of, named_lora_layers, require_injection
from lightning_lora.peft.load import load_peft


@dataclass(frozen=True)
class Start:
    """What a run starts from.

    Attributes:
        given: settings that replace the defaults, or those of the file; what the file holds must fit them.
        path: name of the pretrained model, as ``LoRACallback(module=...)``.
        init_from: the file or directory with the adapters that the run starts from.
        on_nonfinite: what to do about an adapter there that holds NaN or infinity.
        quantization: ``quantize`` and ``quantize_exclude`` of :func:`~lightning_lora.inject`.
        adapters: the config of every adapter with a name; empty for one without.
        rates: what takes the place of the numbers of ``parameter_groups``, by adapter.
    """

    given: dict[str, Any]
    path: str | None
    init_from: str | None
    on_nonfinite: OnNonfinite
    quantization: dict[str, Any]
    adapters: dict[str, LoRAConfig] = dataclasses.field(default_factory=dict)
    rates: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)


def configure_then_adapt(configure_model: Callable[[], None], pl_module: nn.Module, start: Start) -> None:
    """Stand in for ``configure_model``: build, then adapt."""
    configure_model()
    source = None if start.init_from is None else _read_base_first(pl_module, start.path)
    adapt_module(pl_module, start)
    if source is not None:
        require_injection(find_root(pl_module, start.path)[1]).base_weights = source


def adapt_module(pl_module: nn.Module, start: Start) -> None:
    """Adapt the root inside ``pl_module``, from a file if there is one; a root that was adapted so stays as it is."""
    root_path, root = find_root(pl_module, start.path)
    injection, init_from = injection_of(root), start.init_from
    if init_from is None:
        _adapt(root, _wanted({"": LoRAConfig()}, start), start)
        return
    if injection is not None and injection.source == init_from:
        _adapt(root, _wanted(injection.configs, start), start)
        return
    if injection is not None:
        if has_trained(root):
            raise ValueError(
                f"init_from={init_from!r} is for a model without adapters; this one has adapters that trained. Call "
                "remove(model) first, or leave init_from out to go on with them"
            )
        remove(root)
    if location(init_from).is_dir():
        _adapt_from_directory(root, start, init_from)
    else:
        _adapt_from_checkpoint(root, start, *adapters_at(read_checkpoint(init_from), root_path, init_from))
    injection = require_injection(root)
    injection.source = init_from
    for name, one in injection.named.items():
        one.rates = start.rates.get(name, {})
    rank_zero_info(f"LoRA starts from {init_from}: {'; '.join(_in_words(*one) for one in injection.configs.items())}")


def _in_words(name: str, config: LoRAConfig) -> str:
    own = LoRAConfig().to_dict()
    changed = [f"{field}={value!r}" for field, value in config.to_dict().items() if value != own[field]]
    words = ", ".join(changed) or "all settings at their defaults"
    return f"adapter {name!r} with {words}" if name else words


def _wanted(former: Mapping[str, LoRAConfig], start: Start) -> dict[str, LoRAConfig]:
    """Return the configs of the run's adapters, by name: those that were given, else ``former`` with other settings."""
    return start.adapters or {name: dataclasses.replace(config, **start.given) for name, config in former.items()}


def _adapt(root: nn.Module, configs: Mapping[str, LoRAConfig], start: Start) -> None:
    """Adapt a model, whose adapters may be there; raise ``ValueError`` where it was adapted otherwise."""
    for name, config in configs.items():
        if name:
            quantize_once(root, **start.quantization)
            add_adapter(root, name, config)
            require_injection(root).named[name].rates = start.rates.get(name, {})
        elif injection_of(root) is None:
            # the first lines of the run say what inject would
            inject_anew(root, config, check_ranks=True, **start.quantization)
        else:
            inject(root, config, **start.quantization)


def _adapt_from_checkpoint(
    root: nn.Module, start: Start, checkpoint: Mapping[str, Any], configs: Mapping[str, LoRAConfig]
) -> None:
    """Adapt ``root`` with the file's configs, in which settings are replaced, and copy the weights inside it."""
    try:
        for name, config in _wanted(configs, start).items():
            adapt_anew(root, name, config, **start.quantization)
        tensors = fitting_tensors(checkpoint, root, start.init_from, on_nonfinite=start.on_nonfinite)
    except ValueError:
        if injection_of(root) is not None:
            remove(root)
        raise
    copy_tensors(tensors, root)


def _adapt_from_directory(root: nn.Module, start: Start, path: str) -> None:
    """Adapt ``root`` as a PEFT directory says, or with other settings if its tensors fit them."""
    load_peft(root, path, on_nonfinite=start.on_nonfinite, **start.quantization)
    configs = require_injection(root).configs
    if _wanted(configs, start) == configs:
        return
    held = adapter_checkpoint(root)
    held["state_dict"] = {name: tensor.clone() for name, tensor in held["state_dict"].items()}
    remove(root)
    _adapt_from_checkpoint(root, start, held, configs)


def _read_base_first(pl_module: Any, path: str | None) -> str | None:
    """Fill a model of a family that is read whole from the strategy's ``base_weights``: its adapter's base is checked.

    Returns:
        What was read, if anything.
    """
    _, root = find_root(pl_module, path)
    source: str | None = getattr(pl_module.trainer.strategy, "base_weights", None)
    family = family_of(root)
    if family is None or source is None or injection_of(root) is not None:
        return None
    return source if family.load_base(root, source) else None


def check_built_in_time(root: nn.Module) -> None:
    """Raise ``ValueError`` for a model, or a part of it, that was built after the callback adapted what was there."""
    injection = injection_of(root)
    known = set() if injection is None else set(injection.requires_grad)
    adapters = {id(p) for layer in named_lora_layers(root).values() for _, p in layer.named_adapter_tensors()}
    late = [n for n, p in root.named_parameters() if clean_name(n) not in known and id(p) not in adapters]
    if injection is None or late:
        some = f" ({late[0]!r} is new)" if injection is not None else ""
        raise ValueError(
            f"{type(root).__name__} was built or changed after LoRACallback's setup{some}, in the module's own setup() "
            "perhaps: build the model in __init__ or configure_model"
        )
