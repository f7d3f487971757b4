"""Check that a checkpoint's tensors fit a model, and copy them; everything is checked before anything is copied."""

from collections.abc import Mapping
from typing import Any

from lightning.fabric.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn

from lightning_lora.checkpoint.changed import UNCHANGED, Changed, changed_adapters, compared_names
from lightning_lora.checkpoint.comparison import compare_base
from lightning_lora.checkpoint.file import SECTION, adapters_in, named_tensors, other_state, trained_tensors
from lightning_lora.checkpoint.reading import adapters_by_path, name_of, only_key, renaming, section_of
from lightning_lora.checkpoint.structure import check_structure, quoted
from lightning_lora.model.families import resize_advice
from lightning_lora.model.names import clean_name, is_inside, without_adapter
from lightning_lora.model.one_adapter import each_adapter
from lightning_lora.model.state import (
    OnNonfinite,
    OtherForm,
    check_finite,
    injected_roots,
    is_merged,
    require_injection,
    require_root,
)
from lightning_lora.ops.sharded import logical, write


def load_adapter_state_dict(model: nn.Module, state: Mapping[str, Any], *, on_nonfinite: OnNonfinite = "error") -> None:
    """Copy adapters into ``model``, whose layers must be exactly those of ``state``.

    Of several adapters with names those are copied that both have; a line names the others.

    Args:
        state: what :func:`adapter_state_dict` returned, or a whole checkpoint of Trainer, Fabric or
            :func:`adapter_checkpoint`. A checkpoint also says its scale and base, and those are compared too.
        on_nonfinite: what to do about an adapter that holds NaN or infinity.

    Raises:
        ValueError: a name is missing or left over, a shape, scale or the base differs, or an adapter holds NaN or
            infinity. Nothing is copied then.
    """
    root = require_root(model)
    if SECTION in state:
        tensors = fitting_tensors(state, root, "the checkpoint", on_nonfinite=on_nonfinite)
    else:
        found = {without_adapter(name)[1] for name in state}
        changed = compared_names({"": found - {""} or found}, {"": root}, "the state")
        tensors = {name: value for name, value in state.items() if not changed.drops(name)}
        check_tensors(tensors, root, "the state", changed)
        changed.say("the state")
        check_finite(adapters_in(tensors, root), "the state", on_nonfinite)
    copy_tensors(tensors, root)


def fitting_tensors(
    checkpoint: Mapping[str, Any],
    module: nn.Module,
    source: Any,
    state_key: str | None = None,
    *,
    check_names: bool = True,
    say_form: bool = True,
    on_nonfinite: OnNonfinite = "error",
) -> dict[str, Tensor]:
    """Return the checkpoint's tensors under their names in ``module``, after checking that they fit.

    Compared are, in this order: layers, ranks and scales; token rows; what trains whole; names and shapes; the base.
    Adapters must be finite. Where the adapted model sits (``model.`` in a LightningModule, the top in Fabric) may
    differ between file and module. Named adapters are compared one by one; a line names those that only one has.

    Args:
        state_key: take the tensors under this key of the checkpoint; ``None`` takes the only ones that there are.
        check_names: ``False`` leaves names and shapes to a later :func:`check_tensors`.
        say_form: print a line where the adapter was trained over another form of the base.
        on_nonfinite: what to do about an adapter that holds NaN or infinity.

    Raises:
        ValueError: something differs, or an adapter holds NaN or infinity. The message says what the file has, what the
            model has, and what to do.
    """
    section = section_of(checkpoint, source)
    roots = injected_roots(module)
    if not roots:
        raise ValueError(
            f"{source} is an adapter checkpoint, but the model holds no adapters; call inject(model, config) first"
        )
    if any(is_merged(root) for root in roots.values()):
        raise ValueError("the model's adapters are merged: call unmerge(model) before loading others")
    state_key = only_key(section, source) if state_key is None else state_key
    state = checkpoint.get(state_key)
    keys = {adapter["state_key"] for adapter in section["adapters"]}
    if state_key not in keys or not isinstance(state, Mapping):
        raise ValueError(f"{source} has no adapters under {state_key!r}; it has them under {sorted(keys)}")
    by_path = adapters_by_path(section, roots, state_key, source)
    changed = changed_adapters(checkpoint, module, source, state_key)
    for path, entries in by_path.items():
        _check_entries(entries, roots[path], source)
    if roots.keys() == {""}:  # the adapted model itself: what trained around it has no place here
        file_root = by_path[""][0]["root"]
        state = {name: value for name, value in state.items() if is_inside(name, file_root)}
    rename = renaming(checkpoint, module, source, state_key)
    renamed = {new: value for name, value in state.items() if not changed.drops(new := rename(name))}
    if check_names:
        check_tensors(renamed, module, source, changed)
    forms: dict[str, OtherForm | None] = {}
    for path, (entry, *_) in by_path.items():
        form = forms[path] = _check_base(entry["base"], roots[path], source)
        if form is not None and say_form:
            rank_zero_info(f"{source}: {form.words}")
    check_finite(adapters_in(renamed, module), source, on_nonfinite)
    changed.say(source)
    for path, form in forms.items():
        require_injection(roots[path]).trained_over |= {name_of(entry): form for entry in by_path[path]}
    return renamed


def _check_entries(entries: list[dict[str, Any]], root: nn.Module, source: Any) -> None:
    """Compare the structure of every adapter that the file and ``root`` both have."""
    ours = each_adapter(root)
    for entry in entries:
        name = name_of(entry)
        if name in ours:
            check_structure(entry, ours[name], f"adapter {name!r} in {source}" if name else source)


def _check_base(recorded: dict[str, Any], root: nn.Module, source: Any) -> OtherForm | None:
    """Raise ``ValueError`` where ``root`` is not the base that the file knows; return what differs in form."""
    found = compare_base(root, recorded)
    if found.values is not None:
        origin = f" ({recorded['source']})" if recorded["source"] else ""
        raise ValueError(
            f"{source} was trained on another base model{origin}: {found.values}. Load the base that the adapter was "
            "trained on"
        )
    return found.form


def copy_tensors(tensors: Mapping[str, Tensor], module: nn.Module) -> None:
    """Copy checked tensors into ``module`` in place, each in its own dtype and device."""
    targets = named_tensors(module)
    others = {name: value for name, value in tensors.items() if name not in targets}
    for name in tensors.keys() - others.keys():
        write(targets[name], tensors[name])
    if others:
        own = {clean_name(name): name for name in module.state_dict()}
        module.load_state_dict({own.get(name, name): value for name, value in others.items()}, strict=False)


def complete_state(tensors: Mapping[str, Any], module: nn.Module) -> dict[str, Any]:
    """Return ``module``'s state dict with a checkpoint's tensors in it, for a strict ``load_state_dict``.

    Names are the module's own, such as ``model._orig_mod.`` where a compiled model is, and a tied tensor has its value
    under all of its names. What the checkpoint lacks is as it is in the module.
    """
    state = module.state_dict(keep_vars=True)
    own = {clean_name(name): name for name in state}
    values = {id(state[own[name]]): value for name, value in tensors.items() if name in own}
    others = {name: value for name, value in tensors.items() if name not in own}
    return {**{name: values.get(id(value), value) for name, value in state.items()}, **others}


def check_tensors(tensors: Mapping[str, Any], module: nn.Module, source: Any, changed: Changed = UNCHANGED) -> None:
    """Compare names and shapes of a checkpoint's tensors with what ``module`` trains, but for adapters that it adds."""
    targets = named_tensors(module)
    others = other_state(module)
    missing = [name for name in trained_tensors(module) if name not in tensors and not changed.adds(name)]
    unexpected = [name for name in tensors if name not in targets and name not in others]
    if missing or unexpected:
        raise ValueError(
            f"{source} does not fit {type(module).__name__}: {quoted(missing)} missing in the file, "
            f"{quoted(unexpected)} not in the model"
        )
    for name, value in tensors.items():
        if name in others and name not in targets:
            continue
        expected = tuple(logical(targets[name]).shape)
        if not isinstance(value, Tensor) or tuple(value.shape) != expected:
            given = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            advice = resize_advice(module, name, given, expected) if isinstance(given, tuple) else ""
            raise ValueError(f"{source} has {given} for {name!r}, the model has {expected}{advice}")
