"""``load_peft``: load a PEFT directory into a model."""

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lightning_lora.checkpoint.fingerprint import fingerprint, first_difference, first_other_value, renamed
from lightning_lora.checkpoint.fitting import copy_tensors
from lightning_lora.checkpoint.storage import Location, location
from lightning_lora.model.families import Family, family_of
from lightning_lora.model.inject import inject_anew, remove
from lightning_lora.model.names import clean_name
from lightning_lora.model.state import OnNonfinite, check_finite, require_injection
from lightning_lora.peft.config import CONFIG_NAME, checked
from lightning_lora.peft.diffusers import DIFFUSERS_NAME, read_diffusers
from lightning_lora.peft.directory import Adapter, read_files, sorted_tensors
from lightning_lora.peft.experts import fuse_experts
from lightning_lora.peft.fit import named_by_layer
from lightning_lora.peft.settings import settings_of
from lightning_lora.peft.trained import check_ties, check_trained, set_copies_apart, untrained_values


def load_peft(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    check_base: bool = True,
    component: str | None = None,
    on_nonfinite: OnNonfinite = "error",
) -> nn.Module:
    """Adapt ``model`` as a PEFT directory describes, in place, and load its tensors. Returns the same object.

    The tensors decide which layers are adapted and with what rank; the config must agree with them. Nothing is changed
    unless everything fits. Rows that a resized embedding has beyond those it shares with the model's are copied.

    Args:
        directory: a local one or a URL that fsspec knows, such as ``"s3://bucket/adapter"``.
        component: which model's adapter to take from a directory of diffusers (``pytorch_lora_weights.safetensors``),
            such as ``"unet"`` or ``"text_encoder"``; not needed where it holds one.
        check_base: compare the model with the fingerprint of the base that :func:`save_peft` left in the file.
        on_nonfinite: what to do about an adapter that holds NaN or infinity.

    Raises:
        FileNotFoundError: the directory, its config or its tensors are missing.
        ValueError: the adapter is of another kind, does not fit the model, or holds NaN or infinity, or its files are
            damaged.
    """
    directory = location(directory)
    is_diffusers = (directory / DIFFUSERS_NAME).is_file() and not (directory / CONFIG_NAME).is_file()
    files = read_diffusers(directory, component) if is_diffusers else read_files(directory)
    config = checked(files.config, directory / (DIFFUSERS_NAME if is_diffusers else CONFIG_NAME))
    adapter = sorted_tensors(files._replace(config=config), directory)
    check_finite(files.tensors, directory, on_nonfinite)
    recorded = files.metadata.get("base") if check_base else None
    recorded = recorded and {**recorded, "hashes": torch.tensor(recorded["hashes"])}
    family = family_of(model)
    skeleton = None if family is None else family.skeleton(model)
    if family is not None and skeleton is not None:
        _load_by_skeleton(model, family, skeleton, adapter, recorded)
    else:
        _load(model, adapter, recorded)
    return model


def _load(model: nn.Module, adapter: Adapter, recorded: dict[str, Any] | None) -> None:
    """Check that the adapter fits, adapt the model as it says, and copy its tensors."""
    modules = {clean_name(name): module for name, module in model.named_modules()}
    set_copies_apart(adapter, modules)
    check_ties(model, adapter, modules)
    fuse_experts(adapter, modules)
    tensors = named_by_layer(adapter, modules, model)
    tails = check_trained(model, adapter)
    inject_anew(model, settings_of(model, adapter, tensors, modules), check_ranks=False)
    untold = untrained_values(model, adapter)
    if untold:
        remove(model)
        raise ValueError(
            f"{adapter.source} brings values of its own for {untold[0]!r} ({len(untold)} tensors), which its config "
            "does not train. Is a file damaged, or from another PEFT?"
        )
    if recorded is not None:
        _refuse_base(model, adapter.source, recorded, first_difference(model, recorded))
    copy_tensors(tensors | adapter.trained, model)
    for target, first, rows in tails:
        with torch.no_grad():
            target[first:].copy_(rows)


def _load_by_skeleton(
    model: nn.Module, family: Family, skeleton: nn.Module, adapter: Adapter, recorded: dict[str, Any] | None
) -> None:
    """Load an adapter that names other layers than ``model`` does, by way of a skeleton of those."""
    _load(skeleton, adapter, None)
    inject_anew(model, require_injection(skeleton).config, check_ranks=False)
    if recorded is not None:
        own = renamed(fingerprint(model), family.peft_name)
        _refuse_base(model, adapter.source, recorded, first_other_value(own, recorded))
    _, sources = family.adapted_view(model)
    copy_tensors({source: skeleton.get_parameter(name).detach() for name, (_, source) in sources.items()}, model)


def _refuse_base(model: nn.Module, directory: Location, recorded: Mapping[str, Any], difference: str | None) -> None:
    """Give the model back and raise ``ValueError`` where its base is not the recorded one."""
    if difference is None:
        return
    remove(model)
    source = f" ({recorded['source']})" if recorded.get("source") else ""
    raise ValueError(
        f"{directory} was trained on another base model{source}: {difference}. Load that base, or accept this one with "
        "check_base=False"
    )
