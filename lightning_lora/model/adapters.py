"""Several adapters with names on one model: add one, and list them."""

import re
from collections.abc import Callable, Iterable, Mapping
from itertools import groupby
from typing import Any, TypeVar

from torch import nn

from lightning_lora.config import LoRAConfig
from lightning_lora.fuse.siblings import share_seeds
from lightning_lora.model.apply import adapt_layer, dtype_of, tag_parts
from lightning_lora.model.base_form import quantization_of
from lightning_lora.model.hosts import fuse_anew, host_for, looked_past, put_adapter
from lightning_lora.model.init import initialize, seed_of
from lightning_lora.model.inject import inject_anew, remove
from lightning_lora.model.layer_plan import Plan
from lightning_lora.model.names import BASE, clean_name, named_modules
from lightning_lora.model.plan import plan
from lightning_lora.model.quantize import quantize_once
from lightning_lora.model.side_effects import (
    complete_state_dict,
    freeze_statistics,
    keep_off_fused_paths,
    unchanged_on_error,
)
from lightning_lora.model.state import (
    Injection,
    NamedAdapter,
    injection_of,
    require_injection,
    require_root,
    uncompiled,
)
from lightning_lora.model.wrapping import run_at_injection
from lightning_lora.ops.dropout import Seeds

T = TypeVar("T")


def add_adapter(model: nn.Module, name: str, config: LoRAConfig | None = None) -> nn.Module:
    """Add an adapter called ``name`` to ``model`` in place, beside those that it has. Returns the same object.

    The first one freezes the base. Each has the ranks, targets, dropout and start of its own config, and starts as it
    would without the others. Its parameters are ``<layer>.lora.<name>.lora_A`` and so on. Which adapters act is said by
    :func:`~lightning_lora.active`; a single one acts by itself. Adding an adapter that is there, with an equal config,
    does nothing.

    Args:
        name: letters, digits, ``_`` and ``-``.

    Raises:
        ValueError: the name is taken or has other characters; the model is adapted without a name; the config does not
            fit the model, or trains something that adapters would share (heads, biases, rows of an embedding).
    """
    check_name(name)
    root = uncompiled(model)
    injection = injection_of(root)
    config = LoRAConfig() if config is None else config
    existing = None if injection is None else injection.named.get(name)
    if existing is not None:
        if existing.plan.config == config:
            return model
        raise ValueError(
            f"there is an adapter {name!r} with another config: call remove(model, adapter={name!r}) first"
        )
    add_anew(root, name, config, check_ranks=True)
    return model


def adapt_anew(
    root: nn.Module, name: str, config: LoRAConfig, *, check_ranks: bool = False, **quantization: Any
) -> None:
    """Adapt a model as a file says: without a name, or by :func:`add_anew`.

    Args:
        name: ``""`` for none.
        quantization: ``quantize`` and ``quantize_exclude``.
    """
    if not name:
        inject_anew(root, config, check_ranks=check_ranks, **quantization)
        return
    quantize_once(root, **quantization)
    add_anew(root, name, config, check_ranks=check_ranks)


def adapt_checked(
    root: nn.Module, configs: Mapping[str, LoRAConfig], check: Callable[[bool], T], **quantization: Any
) -> T:
    """Add the adapters of a file, and return what ``check`` returns; if it raises, the model is given back as it was.

    A base that is to be quantised is checked before that, too: its values would not come back.

    Args:
        configs: by name; ``""`` for an adapter without one.
        check: raises ``ValueError`` if the adapted model is not the right one. Its argument says whether the base has
            the form that it will keep.
        quantization: ``quantize`` and ``quantize_exclude``.
    """
    forms = [quantization]
    if quantization.get("quantize") is not None and quantization_of(root) is None and injection_of(root) is None:
        for config in configs.values():
            plan(root, config, check_ranks=False, **quantization)
        forms = [{}, quantization]
    for form in forms:
        added: list[str] = []
        try:
            for name, config in configs.items():
                adapt_anew(root, name, config, **form)
                added.append(name)
            checked = check(form is quantization)
        except ValueError:
            _take_out(root, added)
            raise
        if form is not quantization:
            _take_out(root, added)
    return checked


def _take_out(root: nn.Module, names: Iterable[str]) -> None:
    for name in names:
        remove(root, name or None)


def add_anew(root: nn.Module, name: str, config: LoRAConfig, *, check_ranks: bool) -> None:
    """Add an adapter of a name that is free; ``check_ranks=False`` takes ranks above a layer's size."""
    injection = injection_of(root)
    if injection is not None and not injection.named:
        raise ValueError(
            f"{type(root).__name__} has an adapter without a name: call remove(model) first, and give every adapter a "
            "name with add_adapter"
        )
    with looked_past(root):
        decided = plan(root, config, check_ranks=check_ranks)
    _check_own(name, decided)
    _check_fuse(name, config, {} if injection is None else injection.named)
    _carry_out(root, name, decided)


def adapters(model: nn.Module) -> dict[str, LoRAConfig]:
    """Return the configs of the named adapters of ``model``, by name, in the order in which they were added."""
    configs = require_injection(require_root(model)).configs
    return {name: config for name, config in configs.items() if name}


def check_name(name: str) -> None:
    """Raise ``ValueError`` for what cannot be a folder and a part of parameters' names."""
    if not isinstance(name, str):
        raise TypeError(f"an adapter's name must be a string, got {name!r}")
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise ValueError(f"{name!r} cannot name an adapter: a name has letters, digits, '_' and '-' alone")
    if name == BASE:
        raise ValueError(f"{name!r} cannot name an adapter: it means the base alone")
    if hasattr(nn.Module, name) or name in vars(nn.Module()):
        raise ValueError(f"{name!r} cannot name an adapter: it is an attribute of every torch module")


def _check_own(name: str, decided: Plan) -> None:
    """Raise ``ValueError`` for what a config trains that several adapters of one model would share."""
    config = decided.config
    shared = {
        "modules_to_save": decided.trained_whole,
        "bias": config.bias if config.bias != "none" else (),
        "trainable_token_indices": decided.token_rows and config.trainable_token_indices,
        "adalora": config.adalora or (),
    }
    for option, value in shared.items():
        if value:
            remedy = "modules_to_save=[]" if option == "modules_to_save" else f"no {option}"
            raise ValueError(
                f"adapter {name!r} would train {option}={value!r}, which is no adapter's own: adapters with names have "
                f"low-rank factors alone. Give {remedy}, or train one adapter without a name"
            )


def _check_fuse(name: str, config: LoRAConfig, named: Mapping[str, NamedAdapter]) -> None:
    for other, one in named.items():
        if one.plan.config.fuse != config.fuse:
            raise ValueError(
                f"fuse={config.fuse} of adapter {name!r} is not that of {other!r}: layers are fused for all adapters "
                "of a model, or for none"
            )


def _carry_out(root: nn.Module, name: str, decided: Plan) -> None:
    config, dtype = decided.config, dtype_of(decided.config)
    with unchanged_on_error(root):
        injection = injection_of(root) or _begin(root, decided)
        modules = named_modules(root)
        by_layer = {layer: list(pairs) for layer, pairs in groupby(decided, lambda pair: pair.layer)}
        seen = {layer: host_for(modules[layer], pairs[0].mixin, injection.choice) for layer, pairs in by_layer.items()}
        seeds = Seeds(seed_of(f"dropout of {name}", config.init_seed) % 2**31)
        adapted = {layer: adapt_layer(modules | seen, layer, pairs, dtype) for layer, pairs in by_layer.items()}
        share_seeds(adapted, seeds)
        for layer, adapter in adapted.items():
            put_adapter(modules[layer], name, adapter)  # type: ignore[arg-type]  # a host
        initialize(adapted, by_layer, config)
        tag_parts(decided, root)
        if config.fuse:
            fuse_anew(root)
        freeze_statistics(root, ())
        keep_off_fused_paths(root, injection)
        injection.named[name] = NamedAdapter(decided.without_model(), seeds)
        injection.choice.seeds[name] = seeds
        run_at_injection()


def _begin(root: nn.Module, decided: Plan) -> Injection:
    """Freeze the base and leave the record on it."""
    common = Plan(LoRAConfig(), model_name=decided.model_name, num_base=decided.num_base)
    injection = Injection(common)
    for name, parameter in root.named_parameters():
        injection.requires_grad[clean_name(name)] = parameter.requires_grad
        parameter.requires_grad = False
    root.register_load_state_dict_pre_hook(complete_state_dict)
    root.lora_injection = injection  # type: ignore[assignment]  # a plain attribute
    return injection
