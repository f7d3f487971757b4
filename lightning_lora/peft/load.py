"""``load_peft``: load a PEFT directory into a model, after checking the base tensors that it holds."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_info
from torch import nn

from lightning_lora.checkpoint.comparison import compare_base, first_other_value, other_form
from lightning_lora.checkpoint.fingerprint import fingerprint, renamed
from lightning_lora.checkpoint.fitting import copy_tensors
from lightning_lora.checkpoint.storage import Location, location
from lightning_lora.config import Quantization, answering_other_names
from lightning_lora.model.families import Family, family_of
from lightning_lora.model.inject import inject_checked
from lightning_lora.model.names import clean_name
from lightning_lora.model.state import OnNonfinite, OtherForm, check_finite, require_injection
from lightning_lora.peft.adalora import with_all_ranks
from lightning_lora.peft.base_tensors import check_trained, is_whole, named_tensors, set_copies_apart
from lightning_lora.peft.config import CONFIG_NAME, checked, kind_of
from lightning_lora.peft.diffusers import DIFFUSERS_NAME, read_diffusers
from lightning_lora.peft.directory import Adapter, read_files, sorted_tensors
from lightning_lora.peft.fit import named_by_layer
from lightning_lora.peft.settings import is_value, settings_of, trained_a_copy


@answering_other_names
def load_peft(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    check_base: bool = True,
    component: str | None = None,
    on_nonfinite: OnNonfinite = "error",
    quantize: Quantization | None = None,
    quantize_exclude: str | Sequence[str] | None = None,
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
        quantize, quantize_exclude: quantise the base first, as in :func:`~lightning_lora.inject`.

    Raises:
        FileNotFoundError: the directory, its config or its tensors are missing.
        ValueError: the adapter is of another kind, does not fit the model, or holds NaN or infinity, or its files are
            damaged.
    """
    directory = location(directory)
    is_diffusers = (directory / DIFFUSERS_NAME).is_file() and not (directory / CONFIG_NAME).is_file()
    files = read_diffusers(directory, component) if is_diffusers else read_files(directory)
    config = checked(files.config, directory / (DIFFUSERS_NAME if is_diffusers else CONFIG_NAME))
    files = files._replace(config=config)
    files = with_all_ranks(files, directory) if kind_of(config) == "ADALORA" else files
    adapter = sorted_tensors(files, directory)
    check_finite(files.tensors, directory, on_nonfinite)
    recorded = files.metadata.get("base") if check_base else None
    recorded = recorded and {**recorded, "hashes": torch.tensor(recorded["hashes"])}
    quantization = {"quantize": quantize, "quantize_exclude": quantize_exclude}
    family = family_of(model)
    skeleton = None if family is None else family.skeleton(model)
    if family is not None and skeleton is not None:
        _load_by_skeleton(model, family, skeleton, adapter, recorded, **quantization)
    else:
        _load(model, adapter, recorded, **quantization)
    return model


def _load(model: nn.Module, adapter: Adapter, recorded: dict[str, Any] | None, **quantization: Any) -> None:
    """Check that the adapter fits, adapt the model as it says, and copy its tensors."""
    modules = {clean_name(name): module for name, module in model.named_modules()}
    set_copies_apart(adapter, modules)
    _check_ties(model, adapter, modules)
    tensors = named_by_layer(adapter, modules, model)
    tails = check_trained(model, adapter)
    settings = settings_of(model, adapter, tensors, modules)
    form = inject_checked(model, settings, lambda _: _check(model, adapter, recorded), **quantization)
    if form is not None:
        rank_zero_info(f"{adapter.source}: {form.words}")
    require_injection(model).trained_over = form
    copy_tensors(tensors | adapter.trained, model)
    for target, first, rows in tails:
        target[first:].copy_(rows)


def _check(model: nn.Module, adapter: Adapter, recorded: dict[str, Any] | None) -> OtherForm | None:
    """Raise ``ValueError`` for values that the adapted model has no use for, and for another base.

    Returns:
        In which form the base is stored and in which it was, where these differ.
    """
    untold = _untrained_values(model, adapter)
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


def _load_by_skeleton(
    model: nn.Module,
    family: Family,
    skeleton: nn.Module,
    adapter: Adapter,
    recorded: dict[str, Any] | None,
    **quantization: Any,
) -> None:
    """Load an adapter that names other layers than ``model`` does, by way of a skeleton of those."""
    _load(skeleton, adapter, None)

    def check(_: bool) -> None:
        if recorded is not None:
            own = renamed(fingerprint(model), family.peft_name)
            _refuse_base(adapter.source, recorded, first_other_value(own, recorded))
            require_injection(model).trained_over = other_form(own, recorded)

    inject_checked(model, require_injection(skeleton).config, check, **quantization)
    _, sources = family.adapted_view(model)
    copy_tensors({source: skeleton.get_parameter(name).detach() for name, (_, source) in sources.items()}, model)


def _refuse_base(directory: Location, recorded: Mapping[str, Any], difference: str | None) -> None:
    """Raise ``ValueError`` where a base is not the recorded one."""
    if difference is None:
        return
    source = f" ({recorded['source']})" if recorded.get("source") else ""
    raise ValueError(
        f"{directory} was trained on another base model{source}: {difference}. Load that base, or accept this one with "
        "check_base=False"
    )


def _check_ties(model: nn.Module, adapter: Adapter, modules: Mapping[str, nn.Module]) -> None:
    """Raise ``ValueError`` where PEFT trained a copy of a tensor that is tied to another module's in this model.

    Twins of equal values trained together, and both count as trained.
    """
    twins: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        twins.setdefault(id(parameter), []).append(clean_name(name))
    for group in twins.values():
        copied = [n for n in group if n in adapter.trained and is_whole(n.rpartition(".")[0], adapter)]
        for name in group if copied else []:
            if modules[name.rpartition(".")[0]] is modules[copied[0].rpartition(".")[0]]:
                continue
            value = adapter.trained.get(name, adapter.base.get(name))
            if value is None or not torch.equal(value, adapter.trained[copied[0]]):
                trained = f"{adapter.source} trained {copied[0]!r}"
                raise ValueError(trained_a_copy(trained, name, model, name.rpartition(".")[0]))
            adapter.trained[name] = value
            adapter.base.pop(name, None)


def _untrained_values(model: nn.Module, adapter: Adapter) -> list[str]:
    """Return the base tensors that a file brings and the adapted model does not train, where they differ from it."""
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    whole, own = require_injection(model).trained_whole, named_tensors(model)
    return [
        name
        for name, value in adapter.trained.items()
        if id(own[name]) not in trained
        and not any(name.startswith(f"{module}.") for module in whole)
        and not is_value(value, own[name])
    ]
