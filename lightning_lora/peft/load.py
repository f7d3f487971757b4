"""``load_peft``: load a PEFT directory into a model, after checking the base tensors that it holds."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_info
from torch import nn

from lightning_lora.checkpoint.comparison import compare_base, first_other_value, other_form
from lightning_lora.checkpoint.fingerprint import fingerprint, renamed
from lightning_lora.checkpoint.fitting import copy_tensors
from lightning_lora.checkpoint.storage import Location, location
from lightning_lora.config import LoRAConfig, Quantization, answering_other_names
from lightning_lora.model.adapters import adapt_checked
from lightning_lora.model.families import Family, family_of
from lightning_lora.model.hosts import looked_past
from lightning_lora.model.inject import remove
from lightning_lora.model.names import clean_name
from lightning_lora.model.one_adapter import chosen_adapter
from lightning_lora.model.state import OnNonfinite, OtherForm, injection_of, require_injection, uncompiled
from lightning_lora.peft.base_tensors import check_ties, check_trained, set_copies_apart, untrained_values
from lightning_lora.peft.directory import Adapter
from lightning_lora.peft.fit import named_by_layer
from lightning_lora.peft.folders import folders_of, read_adapter
from lightning_lora.peft.settings import settings_of


@answering_other_names
def load_peft(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    adapter: str | None = None,
    check_base: bool = True,
    component: str | None = None,
    on_nonfinite: OnNonfinite = "error",
    quantize: Quantization | None = None,
    quantize_exclude: str | Sequence[str] | None = None,
) -> nn.Module:
    """Adapt ``model`` as a PEFT directory describes, in place, and load its tensors. Returns the same object.

    The tensors decide which layers are adapted and with what rank; the config must agree with them. Nothing is changed
    unless everything fits. Rows that a resized embedding has beyond those it shares with the model's are copied.

    A directory that holds folders with adapters, and none itself, gives the model all of them, by the folders' names.

    Args:
        directory: a local one or a URL that fsspec knows, such as ``"s3://bucket/adapter"``.
        adapter: the name that the adapter gets, beside others of the model, as in
            :func:`~lightning_lora.add_adapter`; also the folder to take where the directory holds several.
        component: which model's adapter to take from a directory of diffusers (``pytorch_lora_weights.safetensors``),
            such as ``"unet"`` or ``"text_encoder"``; not needed where it holds one.
        check_base: compare the model with the fingerprint of the base that :func:`save_peft` left in the file.
        on_nonfinite: what to do about an adapter that holds NaN or infinity.
        quantize, quantize_exclude: quantise the base first, as in :func:`~lightning_lora.inject`.

    Raises:
        FileNotFoundError: the directory, its config or its tensors are missing.
        ValueError: the name is taken; the adapter is of another kind, does not fit the model, or holds NaN or infinity;
            or its files are damaged.
    """
    source = location(directory)
    root = uncompiled(model)
    folders = folders_of(root, source, adapter)
    read = {name: read_adapter(folder, component, on_nonfinite) for name, folder in folders.items()}
    quantization = {"quantize": quantize, "quantize_exclude": quantize_exclude}
    loaded: list[str] = []
    try:
        for name, theirs in read.items():
            _load_one(root, name, theirs, check_base=check_base, **quantization)
            loaded.append(name)
    except Exception:
        for name in loaded:
            remove(root, name)  # the first of several
        raise
    return model


def _load_one(model: nn.Module, name: str, adapter: Adapter, *, check_base: bool, **quantization: Any) -> None:
    recorded = adapter.metadata.get("base") if check_base else None
    recorded = recorded and {**recorded, "hashes": torch.tensor(recorded["hashes"])}
    family = family_of(model)
    with looked_past(model):
        skeleton = None if family is None else family.skeleton(model)
    if family is not None and skeleton is not None:
        _load_by_skeleton(model, name, family, skeleton, adapter, recorded, **quantization)
    else:
        _load(model, name, adapter, recorded, **quantization)


def _load(model: nn.Module, name: str, adapter: Adapter, recorded: dict[str, Any] | None, **quantization: Any) -> None:
    """Check that the adapter fits, adapt the model as it says, and copy its tensors."""
    with looked_past(model):
        modules = {clean_name(path): module for path, module in model.named_modules()}
        set_copies_apart(adapter, modules)
        check_ties(model, adapter, modules)
        tensors = named_by_layer(adapter, modules, model)
        tails = check_trained(model, adapter)
        config = settings_of(model, adapter, tensors, modules)
    config = _fused_alike(model, config)
    form = adapt_checked(model, {name: config}, lambda _: _check(model, name, adapter, recorded), **quantization)
    if form is not None:
        rank_zero_info(f"{adapter.source}: {form.words}")
    require_injection(model).trained_over[name] = form
    copy_tensors(tensors | adapter.trained, chosen_adapter(model, name or None))
    for target, first, rows in tails:
        target[first:].copy_(rows)


def _check(model: nn.Module, name: str, adapter: Adapter, recorded: dict[str, Any] | None) -> OtherForm | None:
    """Raise ``ValueError`` for values that the adapted model has no use for, and for another base.

    Returns:
        In which form the base is stored and in which it was, where these differ.
    """
    untold = untrained_values(chosen_adapter(model, name or None), adapter)
    if untold:
        raise ValueError(
            f"{adapter.source} brings values of its own for {untold[0]!r} ({len(untold)} tensors), which its config "
            "does not train. Is a file damaged, or from another PEFT?"
        )
    if recorded is None:
        return None
    found = compare_base(model, recorded)
    _refuse_base(adapter.source, recorded, found.values)
    return found.form


def _fused_alike(model: nn.Module, config: LoRAConfig) -> LoRAConfig:
    """Return the config with the ``fuse`` of the adapters that the model has: layers are fused for all, or for none."""
    injection = injection_of(model)
    return config if injection is None else replace(config, fuse=next(iter(injection.configs.values())).fuse)


def _load_by_skeleton(
    model: nn.Module,
    name: str,
    family: Family,
    skeleton: nn.Module,
    adapter: Adapter,
    recorded: dict[str, Any] | None,
    **quantization: Any,
) -> None:
    """Load an adapter that names other layers than ``model`` does, by way of a skeleton of those."""
    _load(skeleton, "", adapter, None)

    def check(_: bool) -> None:
        if recorded is not None:
            own = renamed(fingerprint(model), family.peft_name)
            _refuse_base(adapter.source, recorded, first_other_value(own, recorded))
            require_injection(model).trained_over[name] = other_form(own, recorded)

    config = _fused_alike(model, require_injection(skeleton).config)
    adapt_checked(model, {name: config}, check, **quantization)
    seen = chosen_adapter(model, name or None)
    _, sources = family.adapted_view(seen)
    copy_tensors({source: skeleton.get_parameter(there).detach() for there, (_, source) in sources.items()}, seen)


def _refuse_base(directory: Location, recorded: Mapping[str, Any], difference: str | None) -> None:
    """Raise ``ValueError`` where a base is not the recorded one."""
    if difference is None:
        return
    source = f" ({recorded['source']})" if recorded.get("source") else ""
    raise ValueError(
        f"{directory} was trained on another base model{source}: {difference}. Load that base, or accept this one with "
        "check_base=False"
    )
