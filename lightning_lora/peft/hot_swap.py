"""``hot_swap``: copy a PEFT directory into the adapter that a model has, in place."""

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.checkpoint.comparison import first_other_value, other_form
from lightning_lora.checkpoint.file import trained_tensors
from lightning_lora.checkpoint.fingerprint import known_fingerprint, renamed
from lightning_lora.checkpoint.storage import location
from lightning_lora.model.families import family_of
from lightning_lora.model.names import clean_name, listed
from lightning_lora.model.one_adapter import chosen_adapter
from lightning_lora.model.state import (
    OnNonfinite,
    OtherForm,
    check_finite,
    is_merged,
    named_token_rows,
    require_injection,
    require_root,
)
from lightning_lora.ops.sharded import logical, whole, write
from lightning_lora.peft.adalora import with_all_ranks
from lightning_lora.peft.base_tensors import set_copies_apart
from lightning_lora.peft.config import CONFIG_NAME, checked, kind_of, rank_of, scaling_of
from lightning_lora.peft.contents import described_tensors, parameters_by_layer
from lightning_lora.peft.describe import Entry, describe_for_peft
from lightning_lora.peft.directory import Adapter, read_files, sorted_tensors
from lightning_lora.peft.factors import module_of
from lightning_lora.peft.layout import PREFIX, laid_out, parse_key, put_back, times_added
from lightning_lora.peft.settings import token_rows

_ANEW = "hot_swap copies values alone: remove(model), then load_peft(model, directory) adapts it anew"


def hot_swap(
    model: nn.Module,
    directory: str | os.PathLike[str],
    adapter: str | None = None,
    *,
    check_base: bool = True,
    on_nonfinite: OnNonfinite = "error",
) -> None:
    """Copy a PEFT directory's values into the adapter that ``model`` has, in place, without recompiling it.

    Layers, ranks, scales and what trains whole must be those that the model has; everything is checked before anything
    is copied. An optimizer keeps its moments and step counts, which are those of the former values, and so does
    AdaLoRA its scores: build a new optimizer to train on. Where adapters are spread over ranks each takes its own part;
    call on all ranks then.

    Args:
        directory: what ``save_peft(model, directory)`` or PEFT wrote; a local one or a URL that fsspec knows.
        adapter: the name of the adapter; ``None`` for the only one.
        check_base: compare the model with the fingerprint of the base that ``save_peft`` left in the file.
        on_nonfinite: what to do about an adapter that holds NaN or infinity.

    Raises:
        FileNotFoundError: the directory, its config or its tensors are missing.
        ValueError: there is no such adapter, or several and none is named; the directory's is another one or of
            another base, holds NaN or infinity, or its files are damaged; or the model's adapter is merged or disabled.
    """
    root = require_root(model)
    seen = chosen_adapter(root, adapter)
    if is_merged(root):
        raise ValueError("the model's adapters are merged: call unmerge(model) before a hot swap")
    trained = trained_tensors(seen)  # raises where adapters are disabled
    source = location(directory)
    files = read_files(source)
    files = files._replace(config=checked(files.config, source / CONFIG_NAME))
    files = with_all_ranks(files, source) if kind_of(files.config) == "ADALORA" else files
    theirs = sorted_tensors(files, source)
    check_finite(files.tensors, source, on_nonfinite)
    form = _check_base(root, theirs) if check_base else None
    description = describe_for_peft(seen)
    tensors = described_tensors(seen, description)
    given = _given(description, theirs, seen)
    _check_shapes(description, given, tensors, theirs)
    values = _values(description["entries"], given, {n: t for n, t in tensors.items() if n in trained})
    _check_places(description["entries"], given, values, tensors, source)
    for name, value in values.items():
        write(tensors[name], value)
    injection = require_injection(root)
    injection.trained_over[adapter or injection.only_name] = form


def _check_base(root: nn.Module, theirs: Adapter) -> OtherForm | None:
    """Raise ``ValueError`` where ``root`` is not the base that the directory knows; return what differs in form."""
    recorded, own = theirs.metadata.get("base"), known_fingerprint(root)
    if not recorded:
        return None
    recorded = {**recorded, "hashes": torch.tensor(recorded["hashes"])}
    family = family_of(root)
    if family is not None and family.skeleton(root) is not None:
        own = renamed(own, family.peft_name)
    if (other := first_other_value(own, recorded)) is not None:
        raise ValueError(
            f"{theirs.source} was trained on another base model: {other}. Load that base, or accept this one with "
            "check_base=False"
        )
    return other_form(own, recorded)


def _given(description: Mapping[str, Any], theirs: Adapter, root: nn.Module) -> dict[str, Tensor]:
    """Return the file's tensors by the keys that the model's own file would have.

    Raises:
        ValueError: the file has other layers, rows or trained tensors than the model.
    """
    set_copies_apart(theirs, {clean_name(name): module for name, module in root.named_modules()})
    there = {(kind, name): value for name, pair in theirs.factors.items() for kind, value in pair.items()}
    there |= {("rows", name): value for name, value in theirs.rows.items()}
    there |= {("trained", name): value for name, value in theirs.trained.items()}
    here = {key: _place(key) for key, _, _ in description["entries"]}
    missing = sorted({name for _, name in set(here.values()) - there.keys()})
    extra = sorted({name for _, name in there.keys() - set(here.values())})
    if missing or extra:
        raise ValueError(
            f"{theirs.source} and the model differ in what is adapted or trains whole: {_some(extra)} only in the "
            f"directory, {_some(missing)} only in the model. {_ANEW}"
        )
    if theirs.rows and token_rows(theirs, root) != named_token_rows(root):
        raise ValueError(f"{theirs.source} and the model train other rows of {min(theirs.rows)!r}. {_ANEW}")
    return {key: there[place] for key, place in here.items()}


def _place(key: str) -> tuple[str, str]:
    """Return what a tensor of the model's own file is, as :func:`sorted_tensors` sorts it."""
    kind, name, _ = parse_key(key)
    return key[-1] if kind == "variant" else kind, name  # AdaLoRA's A and B have keys of their own


def _check_shapes(
    description: Mapping[str, Any], given: Mapping[str, Tensor], tensors: Mapping[str, Tensor], theirs: Adapter
) -> None:
    """Raise ``ValueError`` where a tensor has another shape than the model's, or a layer another scale."""
    entries, own = description["entries"], description["config"]
    parameters = parameters_by_layer(entries)
    if any(layout.startswith("half_") for _, layout, _ in entries):
        times_added(theirs.config)
    for key, layout, names in entries:
        metas = [torch.empty(logical(tensors[name]).shape, device="meta") for name in names]
        expected, found, (kind, name) = tuple(laid_out(layout, metas).shape), tuple(given[key].shape), _place(key)
        if expected != found:
            raise ValueError(f"{theirs.source} has {found} for {key!r}, the model has {expected}. {_ANEW}")
        if kind != "A":
            continue
        layer = parameters.get(name, module_of(name))
        r = rank_of(own, layer) if name in parameters else expected[0]
        scaling, own_scaling = scaling_of(theirs.config, layer, r), scaling_of(own, layer, r)
        if abs(scaling - own_scaling) > 1e-9 * abs(scaling):
            raise ValueError(
                f"{theirs.source} scales {name!r} by {scaling:g}, the model by {own_scaling:g}: write the directory "
                f"with save_peft(model, directory), without portable=True. Or: {_ANEW}"
            )


def _values(entries: list[Entry], given: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the whole tensors for the model that the file's are made of."""
    values: dict[str, Tensor] = {}
    for key, layout, (name, *_) in entries:
        if name in targets:
            value = given[key]
            into = values.setdefault(name, value.new_zeros(logical(targets[name]).shape))
            put_back(layout, value, into)
    return values


def _check_places(
    entries: list[Entry],
    given: Mapping[str, Tensor],
    values: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    source: Any,
) -> None:
    """Raise ``ValueError`` where the model, with ``values``, would not write the file: it cannot hold the adapter."""
    for key, layout, names in entries:
        held = [values[name] if name in values else whole(tensors[name]).detach().cpu() for name in names]
        if not torch.equal(laid_out(layout, held).to(given[key].dtype), given[key]):
            raise ValueError(
                f"{source} has values of {key!r} that the model cannot take: another start of PiSSA or OLoRA, or of a "
                f"tensor that is frozen in the model, or shared by two layers of it. {_ANEW}"
            )


def _some(names: list[str]) -> str:
    return listed([repr(name.removeprefix(PREFIX)) for name in names], 3) or "nothing"
