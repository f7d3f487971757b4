"""Describe, read and check adapter checkpoints; everything is checked before anything is copied.

An adapter checkpoint is an ordinary ``torch.save`` file. Its tensors are the adapters and whatever else trains, under
their names in the module that was saved; a section ``"lightning_lora"`` says how they were made.
"""

import io
import pickle
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.checkpoint.all_ranks import meet
from lightning_lora.checkpoint.fingerprint import fingerprint, first_difference, without
from lightning_lora.checkpoint.storage import RemotePath, location
from lightning_lora.compat.torch import non_persistent_buffers
from lightning_lora.config import LoRAConfig
from lightning_lora.layers import LoRALayer
from lightning_lora.model.families import is_pretrained, resize_advice
from lightning_lora.model.names import clean_name, is_inside, joined, listed
from lightning_lora.model.side_effects import FrozenStatistics
from lightning_lora.model.spread import reshard
from lightning_lora.model.state import (
    OnNonfinite,
    check_finite,
    check_not_disabled,
    injected_roots,
    is_merged,
    named_adapter_parameters,
    named_pairs,
    named_token_rows,
    named_trained_whole,
    require_injection,
    require_root,
)
from lightning_lora.ops.sharded import is_sharded, local_part, logical, whole, write

SECTION = "lightning_lora"
FORMAT_VERSION = 1
# what other formats keep of an adapted model in a checkpoint, by name: plain values that each function returns
PARTS: dict[str, Callable[[nn.Module, dict[str, Any]], dict[str, Any]]] = {}


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the adapters, and the heads and biases that train with them, as ``{name: full tensor}``.

    Names are relative to the adapted model. As with ``state_dict``, the tensors are the live ones, detached; those that
    are spread over ranks are gathered (call on all ranks then).

    Raises:
        ValueError: only some of the ranks called it that all must.
    """
    tensors = trained_tensors(require_root(model))
    if any(map(is_sharded, tensors.values())):
        meet("adapter_state_dict")
    return {name: whole(tensor) for name, tensor in tensors.items()}


def load_adapter_state_dict(model: nn.Module, state: Mapping[str, Any], *, on_nonfinite: OnNonfinite = "error") -> None:
    """Copy adapters into ``model``, whose layers must be exactly those of ``state``.

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
        tensors = dict(state)
        check_tensors(tensors, root, "the state")
        check_finite(adapters_in(tensors, root), "the state", on_nonfinite)
    copy_tensors(tensors, root)


def adapter_checkpoint(model: nn.Module) -> dict[str, Any]:
    """Return the adapters with their config and the fingerprint of their base, ready for ``torch.save``.

    Trainer (``LoRACallback(init_from=...)``), Fabric and :func:`load_adapter_state_dict` read the file. An adapter that
    holds NaN or infinity gets a warning, since a save must not end a run; reading it is an error.
    """
    root = require_root(model)
    state = adapter_state_dict(root)
    check_finite(adapters_in(state, root), "the checkpoint", "warn")
    return {"state_dict": state, SECTION: describe(root, "state_dict")}


def adapters_in(tensors: Mapping[str, Any], module: nn.Module) -> dict[str, Any]:
    """Return the adapters of ``module``, and the heads and biases that train with them, from tensors by name."""
    names = [
        joined(path, name)
        for path, root in injected_roots(module).items()
        for name in (*(name for name, _ in named_adapter_parameters(root)), *named_trained_whole(root))
    ]
    return {name: tensors[name] for name in names if name in tensors}


def trained_tensors(module: nn.Module, also: Collection[int] = ()) -> "OrderedDict[str, Tensor]":
    """Return what a checkpoint of ``module`` holds: adapters, parameters that train, and buffers that may change.

    Inside the adapted models those are the buffers beside parameters that train, and of what the user's own
    LightningModule holds; outside, all persistent ones. Tensors that are spread over ranks come as they are.

    Args:
        also: identities (``id``) of further parameters and buffers to hold, such as those of an optimizer.
    """
    roots = injected_roots(module)
    reshard(module)
    for root in roots.values():
        check_not_disabled(root)
    state: OrderedDict[str, Tensor] = OrderedDict()
    wanted = {id(p) for root in roots.values() for p in named_trained_whole(root).values()} | set(also)
    pretrained = [path for path, root in roots.items() if root is not module or is_pretrained(root)]
    whole = [joined(path, name) for path, root in roots.items() for name in require_injection(root).trained_whole]
    for name, owner in module.named_modules():
        clean = clean_name(name)
        adapters = owner.tensor_names if isinstance(owner, LoRALayer) else ()
        for local, parameter in owner._parameters.items():
            if parameter is None:
                continue
            if parameter.requires_grad or local in adapters or id(parameter) in wanted:
                state[joined(clean, local)] = logical(parameter).detach()
        own = [parameter for parameter in owner._parameters.values() if parameter is not None]
        keeps_buffers = any(parameter.requires_grad for parameter in own)
        if not any(is_inside(clean, path) for path in roots):
            keeps_buffers = True
        elif not any(is_inside(clean, path) for path in pretrained):
            keeps_buffers |= not own and not isinstance(owner, FrozenStatistics)
        keeps_buffers |= any(is_inside(clean, path) for path in whole)
        for local, buffer in owner._buffers.items():
            if buffer is None or local in non_persistent_buffers(owner):
                continue
            if keeps_buffers or id(buffer) in wanted:
                state[joined(clean, local)] = buffer.detach()
    return _without_second_names(state)


def describe(module: nn.Module, state_key: str, moved: Collection[int] = ()) -> dict[str, Any]:
    """Return the section ``"lightning_lora"`` of a checkpoint of ``module``, in plain values and tensors.

    Args:
        state_key: the checkpoint's key that the module's tensors are under.
        moved: identities of frozen parameters that the checkpoint holds, since they moved: no part of the base.
    """
    adapters = []
    for path, root in injected_roots(module).items():
        base = fingerprint(root)
        held = {clean_name(name) for name, parameter in root.named_parameters() if id(parameter) in moved}
        adapters.append(
            {
                "name": "default",
                "state_key": state_key,
                "root": path,
                "config": require_injection(root).config.to_dict(),
                **structure(root),
                "base": without(base, held),
                **{name: describe_part(root, base) for name, describe_part in PARTS.items()},
            }
        )
    return {"format_version": FORMAT_VERSION, "adapters": adapters}


def structure(root: nn.Module) -> dict[str, Any]:
    """Return what two models must share for the same tensors to mean the same: pairs, rows, and what trains whole."""
    return {
        "layers": {name: (pair.r, pair.scaling) for name, pair in named_pairs(root).items()},
        "token_rows": named_token_rows(root),
        "trained_whole": list(named_trained_whole(root)),
    }


def read_checkpoint(path: Any, load: Callable[[Any], Any] | None = None) -> dict[str, Any]:
    """Read a checkpoint file without running any code in it (``weights_only=True``).

    Args:
        load: reads the file instead of ``torch.load``, such as the ``CheckpointIO`` of a strategy.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is empty, truncated, of another kind, or holds objects that only code could build.
    """
    if load is None:
        load = _torch_load
    try:
        checkpoint = load(path)
    except FileNotFoundError:
        raise
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds objects that cannot be read without running code from the file, which is never done: "
            f"{error}. If they are hyperparameters of yours, keep them out with "
            "self.save_hyperparameters(ignore=[...]), or allow their class with torch.serialization.add_safe_globals"
        ) from error
    except (EOFError, RuntimeError, OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{path} cannot be read as a checkpoint: it is empty, truncated or of another kind ({error})"
        ) from error
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path} holds a {type(checkpoint).__name__}, not a checkpoint")
    return checkpoint


def section_of(checkpoint: Mapping[str, Any], source: Any) -> dict[str, Any]:
    """Return a checkpoint's section ``"lightning_lora"``.

    Raises:
        ValueError: it has none (it is no adapter checkpoint), or one of a newer format.
    """
    section = checkpoint.get(SECTION)
    if not isinstance(section, dict):
        keys = ", ".join(map(str, list(checkpoint)[:8])) or "none"
        raise ValueError(
            f"{source} is not an adapter checkpoint: it has no section {SECTION!r} (its keys: {keys}). Base "
            "weights are to be loaded into the model before it is adapted; checkpoints of LoRACallback, Fabric "
            "with an adapted model and adapter_checkpoint(model) are read here"
        )
    if section.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{source} has format version {section.get('format_version')!r}; this lightning_lora reads "
            f"{FORMAT_VERSION}. Upgrade it"
        )
    return section


def one_adapter(checkpoint: Mapping[str, Any], root_path: str, source: Any) -> Mapping[str, Any]:
    """Return a checkpoint with the adapter of the model at ``root_path`` alone; one that holds a single one as it is.

    Raises:
        ValueError: it holds several, and none at that path.
    """
    section = section_of(checkpoint, source)
    if len(section["adapters"]) == 1:
        return checkpoint
    own = [adapter for adapter in section["adapters"] if adapter["root"] == root_path]
    if len(own) != 1:
        raise ValueError(
            f"{source} holds adapters of models at {[a['root'] for a in section['adapters']]}, none at {root_path!r}"
        )
    key = own[0]["state_key"]
    state = {name: value for name, value in checkpoint[key].items() if is_inside(name, root_path)}
    return {**checkpoint, key: state, SECTION: {**section, "adapters": own}}


def config_of(checkpoint: Mapping[str, Any], source: Any) -> LoRAConfig:
    """Return the config that a checkpoint with one adapter was written with."""
    adapters = section_of(checkpoint, source)["adapters"]
    if len(adapters) != 1:
        raise ValueError(f"{source} holds {len(adapters)} adapters, at {[a['root'] for a in adapters]}; expected one")
    return LoRAConfig.from_dict(adapters[0]["config"])


def fitting_tensors(
    checkpoint: Mapping[str, Any],
    module: nn.Module,
    source: Any,
    state_key: str | None = None,
    *,
    check_names: bool = True,
    on_nonfinite: OnNonfinite = "error",
) -> dict[str, Tensor]:
    """Return the checkpoint's tensors under their names in ``module``, after checking that they fit.

    Compared are, in this order: layers, ranks and scales; token rows; what trains whole; names and shapes; the base.
    Adapters must be finite. Where the adapted model sits (``model.`` in a LightningModule, the top in Fabric) may
    differ between file and module.

    Args:
        state_key: take the tensors under this key of the checkpoint; ``None`` takes the only ones that there are.
        check_names: ``False`` leaves names and shapes to a later :func:`check_tensors`.
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
    keys = {adapter["state_key"] for adapter in section["adapters"]}
    if state_key is None:
        if len(keys) != 1:
            raise ValueError(f"{source} holds several adapted models, {sorted(keys)}; expected one")
        state_key = next(iter(keys))
    state = checkpoint.get(state_key)
    if state_key not in keys or not isinstance(state, Mapping):
        raise ValueError(f"{source} has no adapters under {state_key!r}; it has them under {sorted(keys)}")
    by_path = _by_path(section, roots, state_key, source)
    for path, adapter in by_path.items():
        check_structure(adapter, roots[path], source)
    rename = _renaming(by_path)
    if roots.keys() == {""}:  # the adapted model itself: what trained around it has no place here
        file_root = by_path[""]["root"]
        state = {name: value for name, value in state.items() if is_inside(name, file_root)}
    renamed = {rename(name): value for name, value in state.items()}
    if check_names:
        check_tensors(renamed, module, source)
    for path, adapter in by_path.items():
        difference = first_difference(roots[path], adapter["base"])
        if difference is not None:
            origin = adapter["base"]["source"]
            raise ValueError(
                f"{source} was trained on another base model{f' ({origin})' if origin else ''}: {difference}. "
                "Load the base that the adapter was trained on"
            )
    check_finite(adapters_in(renamed, module), source, on_nonfinite)
    return renamed


def renaming(checkpoint: Mapping[str, Any], module: nn.Module, source: Any, state_key: str) -> Callable[[str], str]:
    """Return the function from a name in the file to the name in ``module``, where the root may sit elsewhere."""
    return _renaming(_by_path(section_of(checkpoint, source), injected_roots(module), state_key, source))


def _by_path(
    section: Mapping[str, Any], roots: Mapping[str, nn.Module], state_key: str, source: Any
) -> dict[str, dict[str, Any]]:
    """Return the file's adapters by the path that each one has in the module."""
    theirs = {adapter["root"]: adapter for adapter in section["adapters"] if adapter["state_key"] == state_key}
    if len(theirs) == 1 == len(roots):
        return {next(iter(roots)): next(iter(theirs.values()))}
    if theirs.keys() != roots.keys():
        raise ValueError(f"{source} holds adapters for {list(theirs)}, the model has them at {list(roots)}")
    return theirs


def _renaming(by_path: Mapping[str, Mapping[str, Any]]) -> Callable[[str], str]:
    def rename(name: str) -> str:
        for path, adapter in by_path.items():
            if is_inside(name, adapter["root"]):
                return joined(path, _relative(name, adapter["root"]))
        return name

    return rename


def other_state(module: nn.Module) -> dict[str, Any]:
    """Return what a state dict holds besides tensors of modules: extra state, persistent states of metrics.

    The pretrained models' own, such as a quantised base's, is left out.
    """
    tensors = _named_tensors(module)
    pretrained = [path for path, root in injected_roots(module).items() if root is not module or is_pretrained(root)]
    state = {clean_name(name): value for name, value in module.state_dict().items()}
    return {
        name: value
        for name, value in state.items()
        if name not in tensors and not any(is_inside(name, path) for path in pretrained)
    }


def copy_tensors(tensors: Mapping[str, Tensor], module: nn.Module) -> None:
    """Copy checked tensors into ``module`` in place, each in its own dtype and device."""
    targets = _named_tensors(module)
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


def check_structure(adapter: Mapping[str, Any], root: nn.Module, source: Any) -> None:
    """Compare a file's :func:`structure` with that of ``root``.

    Raises:
        ValueError: a layer, rank, scale, row or what trains whole differs. The message says where.
    """
    theirs = {name: tuple(value) for name, value in adapter["layers"].items()}
    ours = {name: (pair.r, pair.scaling) for name, pair in named_pairs(root).items()}
    _check_same_names("adapted layers", theirs, ours, source)
    for name, (r, scaling) in theirs.items():
        own_r, own_scaling = ours[name]
        if r != own_r:
            raise ValueError(
                f"{source} has r={r} at {name!r}, the model has r={own_r}: adapt the model with the file's rank"
            )
        if abs(scaling - own_scaling) > 1e-9 * abs(scaling):
            raise ValueError(
                f"{source} scales {name!r} by {scaling:g}, the model by {own_scaling:g}: adapt it with the file's "
                "alpha and use_rslora"
            )
    rows = adapter.get("token_rows", {})
    if rows != named_token_rows(root):
        raise ValueError(
            f"{source} trains rows {_short(rows)} of embeddings, the model {_short(named_token_rows(root))}: adapt it "
            "with the file's trainable_token_indices"
        )
    _check_same_names("tensors that train whole", adapter["trained_whole"], named_trained_whole(root), source)


def _short(rows: Mapping[str, list[int]]) -> str:
    return ", ".join(f"{name}: {ids[:5]}{' ...' if len(ids) > 5 else ''}" for name, ids in rows.items()) or "none"


def _check_same_names(what: str, theirs: Any, ours: Any, source: Any) -> None:
    missing, extra = [n for n in ours if n not in theirs], [n for n in theirs if n not in ours]
    if missing or extra:
        raise ValueError(
            f"{source} and the model differ in their {what}: {_some(extra)} only in the file, {_some(missing)} "
            "only in the model. Use the target_modules, modules_to_save and bias that the file was written with"
        )


def check_tensors(tensors: Mapping[str, Any], module: nn.Module, source: Any) -> None:
    """Compare names and shapes of a checkpoint's tensors with what ``module`` trains."""
    targets = _named_tensors(module)
    others = other_state(module)
    missing = [name for name in trained_tensors(module) if name not in tensors]
    unexpected = [name for name in tensors if name not in targets and name not in others]
    if missing or unexpected:
        raise ValueError(
            f"{source} does not fit {type(module).__name__}: {_some(missing)} missing in the file, "
            f"{_some(unexpected)} not in the model"
        )
    for name, value in tensors.items():
        if name in others and name not in targets:
            continue
        expected = tuple(logical(targets[name]).shape)
        if not isinstance(value, Tensor) or tuple(value.shape) != expected:
            given = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            advice = resize_advice(module, name, given, expected) if isinstance(given, tuple) else ""
            raise ValueError(f"{source} has {given} for {name!r}, the model has {expected}{advice}")


def _some(names: list[str]) -> str:
    return listed([repr(name) for name in names], 3) or "nothing"


def _named_tensors(module: nn.Module) -> dict[str, Tensor]:
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    return {clean_name(name): tensor for name, tensor in named}


def _without_second_names(state: "OrderedDict[str, Tensor]") -> "OrderedDict[str, Tensor]":
    """Keep the first name of a tied tensor."""
    seen: set[tuple[Any, ...]] = set()
    kept: OrderedDict[str, Tensor] = OrderedDict()
    for name, tensor in state.items():
        address = local_part(tensor).data_ptr()
        key = (address, tuple(tensor.shape), tensor.stride())
        if tensor.numel() == 0 or address == 0 or key not in seen:
            seen.add(key)
            kept[name] = tensor
    return kept


def _relative(name: str, path: str) -> str:
    return name[len(path) + 1 :] if path else name


def _torch_load(path: Any) -> Any:
    where = location(path)
    source = io.BytesIO(where.read_bytes()) if isinstance(where, RemotePath) else where
    return torch.load(source, map_location="cpu", weights_only=True)
