"""Match the optimizer state of a file to an optimizer's parameters by their names."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from lightning_lora.checkpoint.changed import UNCHANGED, Changed, Places, is_of
from lightning_lora.checkpoint.packed_optimizer import check_packer, with_packed
from lightning_lora.model.names import clean_name


def names_of(module: nn.Module, prefix: str = "") -> dict[int, str]:
    """Return the clean names of the module's parameters by identity."""
    return {id(parameter): prefix + clean_name(name) for name, parameter in module.named_parameters()}


def parameter_names(optimizer: Optimizer, names: Mapping[int, str]) -> list[list[str]]:
    """Return the name of every parameter, group by group; one that ``names`` lacks gets its position."""
    return [
        [names.get(id(p), f"#{index}.{position}") for position, p in enumerate(group["params"])]
        for index, group in enumerate(optimizer.param_groups)
    ]


def match_by_name(
    state: dict[str, Any],
    saved_names: list[list[str]],
    optimizer: Optimizer,
    names: Mapping[int, str],
    rename: Callable[[str], str],
    source: Any,
    changed: Changed = UNCHANGED,
) -> dict[str, Any]:
    """Return an optimizer state with its entries in the order of ``optimizer``'s parameters, matched by name.

    What is of added adapters has no entry, and a group of them alone the settings that it has.

    Raises:
        ValueError: the optimizer has other parameters, has them in other groups, or keeps its state in another form.
    """
    check_packer(state, optimizer, source)
    own_names = parameter_names(optimizer, names)
    theirs = [[rename(name) for name in group] for group in saved_names]
    places = paired_groups(theirs, state["param_groups"], own_names, optimizer.param_groups, source, changed)
    ids = {
        name: saved_id
        for group_names, group in zip(theirs, state["param_groups"], strict=True)
        for name, saved_id in zip(group_names, group["params"], strict=True)
    }
    order = [name for group in own_names for name in group]
    position = {name: index for index, name in enumerate(order)}
    groups = []
    for group_names, own, place in zip(own_names, optimizer.param_groups, places, strict=True):
        group = own if place is None else state["param_groups"][place]
        groups.append({**group, **_way_of_stepping(group, own), "params": [position[name] for name in group_names]})
        if "param_names" in own:
            groups[-1]["param_names"] = own["param_names"]
    entries = {position[name]: state["state"][ids[name]] for name in order if ids.get(name) in state["state"]}
    return with_packed({**state, "state": entries, "param_groups": groups}, source)


def paired_groups(
    theirs: list[list[str]],
    their_groups: Sequence[Mapping[str, Any]],
    ours: list[list[str]],
    our_groups: Sequence[Mapping[str, Any]],
    source: Any,
    changed: Changed = UNCHANGED,
) -> list[int | None]:
    """Return the place in a file of each of an optimizer's groups; ``None`` for a group of added adapters alone.

    Groups of dropped adapters alone are passed over. Those of one adapter, which :func:`parameter_groups` marks, are
    found in whatever order the adapters were added.

    Args:
        theirs, ours: the names of the parameters, group by group.

    Raises:
        ValueError: the groups are of other parameters.
    """
    saved = _kept(theirs, their_groups, changed.dropped)
    kept = _kept(ours, our_groups, changed.added)
    if [sorted(group) for _, group in saved] != [sorted(group) for _, group in kept]:
        raise ValueError(_other_groups([group for _, group in saved], [group for _, group in kept], source))
    place_of = {own: place for (place, _), (own, _) in zip(saved, kept, strict=True)}
    return [place_of.get(index) for index in range(len(ours))]


def _kept(names: list[list[str]], groups: Sequence[Mapping[str, Any]], left_out: Places) -> list[tuple[int, list[str]]]:
    """Return the place and the names of each group without adapters that are left out and groups of those alone."""
    adapters = {adapter for _, adapter in left_out}
    kept = []
    for place, (own, group) in enumerate(zip(names, groups, strict=True)):
        left = [name for name in own if not is_of(name, left_out)]
        if left or (not own and group.get("adapter") not in adapters):  # parameter_groups gives empty ones, too
            kept.append((place, left))
    return sorted(kept, key=lambda one: str(groups[one[0]].get("adapter", "")))


def _other_groups(theirs: list[list[str]], ours: list[list[str]], source: Any) -> str:
    gone = sorted({n for g in theirs for n in g} - {n for g in ours for n in g})[:3]
    new = sorted({n for g in ours for n in g} - {n for g in theirs for n in g})[:3]
    return (
        f"the optimizer state in {source} is for other parameters or groups: sizes of groups {[*map(len, theirs)]} "
        f"there, {[*map(len, ours)]} here; only there {gone}, only here {new}. Resume with the configure_optimizers "
        "that the file was written with, or warm-start with LoRACallback(init_from=...)"
    )


def _way_of_stepping(saved: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Return the optimizer's own ``foreach`` and ``fused`` where the file leaves both open, which torch would load."""
    names = ("foreach", "fused")
    is_open = all(name in saved and saved[name] is None for name in names)
    return {name: own[name] for name in names if name in own} if is_open else {}
