"""Adapt the pretrained model inside a LightningModule as ``LoRACallback`` was told: anew, or from a file."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lightning.fabric.utilities.rank_zero import rank_zero_info
from torch import nn

from lightning_lora.checkpoint.file import structure, trained_tensors
from lightning_lora.checkpoint.fitting import check_tensors, copy_tensors, fitting_tensors
from lightning_lora.checkpoint.reading import one_adapter, read_checkpoint
from lightning_lora.checkpoint.storage import location
from lightning_lora.checkpoint.structure import check_structure
from lightning_lora.config import LoRAConfig
from lightning_lora.model.adapters import add_adapter
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
    """

    given: dict[str, Any]
    path: str | None
    init_from: str | None
    on_nonfinite: OnNonfinite
    quantization: dict[str, Any]
    adapters: dict[str, LoRAConfig] = dataclasses.field(default_factory=dict)


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
    if start.adapters:
        _adapt_by_name(root, start)
        return
    injection, init_from = injection_of(root), start.init_from
    if init_from is None and injection is None:
        # the first lines of the run say what inject would
        inject_anew(root, LoRAConfig(**start.given), check_ranks=True, **start.quantization)
        return
    if init_from is None:
        inject(root, LoRAConfig(**start.given), **start.quantization)  # an error where it was adapted otherwise
        return
    if injection is not None and injection.source == init_from:
        config = dataclasses.replace(injection.config, **start.given)
        inject(root, config, **start.quantization)  # an error where it was adapted otherwise
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
        _adapt_from_checkpoint(root, root_path, start, init_from)
    injection = require_injection(root)
    injection.source = init_from
    own = LoRAConfig().to_dict()
    changed = [f"{name}={value!r}" for name, value in injection.config.to_dict().items() if value != own[name]]
    rank_zero_info(f"LoRA starts from {init_from}: {', '.join(changed) or 'all settings at their defaults'}")


def _adapt_by_name(root: nn.Module, start: Start) -> None:
    """Quantise the base, if that is asked for, and add every adapter that is not there."""
    quantize_once(root, **start.quantization)
    for name, config in start.adapters.items():
        add_adapter(root, name, config)


def _adapt_from_checkpoint(root: nn.Module, root_path: str, start: Start, path: str) -> None:
    """Adapt ``root`` with the file's config, in which settings are replaced, and copy the weights inside it."""
    checkpoint, config = one_adapter(read_checkpoint(path), root_path, path)
    inject_anew(root, dataclasses.replace(config, **start.given), check_ranks=False, **start.quantization)
    try:
        tensors = fitting_tensors(checkpoint, root, path, on_nonfinite=start.on_nonfinite)
    except ValueError:
        remove(root)
        raise
    copy_tensors(tensors, root)


def _adapt_from_directory(root: nn.Module, start: Start, path: str) -> None:
    """Adapt ``root`` as a PEFT directory says, or with other settings if its tensors fit them."""
    load_peft(root, path, on_nonfinite=start.on_nonfinite, **start.quantization)
    config = require_injection(root).config
    wanted = dataclasses.replace(config, **start.given)
    if wanted == config:
        return
    described = structure(root)
    tensors = {name: tensor.clone() for name, tensor in trained_tensors(root).items()}
    remove(root)
    inject_anew(root, wanted, check_ranks=False)
    try:
        check_structure(described, root, path)
        check_tensors(tensors, root, path)
    except ValueError:
        remove(root)
        raise
    copy_tensors(tensors, root)


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
