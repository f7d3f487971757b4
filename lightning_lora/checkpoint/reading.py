"""Read adapter checkpoint files without running any code in them: content, section, and names."""

import io
import pickle
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from lightning_lora.checkpoint.file import FORMAT_VERSION, SECTION
from lightning_lora.checkpoint.storage import RemotePath, location
from lightning_lora.config import LoRAConfig
from lightning_lora.model.names import is_inside, joined
from lightning_lora.model.state import injected_roots


def read_checkpoint(path: Any, load: Callable[[Any], Any] | None = None) -> dict[str, Any]:
    """Read a checkpoint file without running any code in it (``weights_only=True``).

    Args:
        load: reads the file instead of ``torch.load``, such as the ``CheckpointIO`` of a strategy.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is empty, truncated, of another kind, or holds objects that only code could build.
    """
    try:
        checkpoint = (_torch_load if load is None else load)(path)
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


def _torch_load(path: Any) -> Any:
    where = location(path)
    source = io.BytesIO(where.read_bytes()) if isinstance(where, RemotePath) else where
    return torch.load(source, map_location="cpu", weights_only=True)


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


def adapters_at(
    checkpoint: Mapping[str, Any], root_path: str, source: Any
) -> tuple[Mapping[str, Any], dict[str, LoRAConfig]]:
    """Return a checkpoint with the adapters of the model at ``root_path``, or of its only one, and their configs.

    Raises:
        ValueError: it holds those of several models, and none at that path.
    """
    section = section_of(checkpoint, source)
    models = {(entry["root"], entry["state_key"]) for entry in section["adapters"]}
    own = [one for one in section["adapters"] if one["root"] == root_path or len(models) == 1]
    if len({one["state_key"] for one in own}) != 1:
        raise ValueError(
            f"{source} holds adapters of models at {sorted({p for p, _ in models})}, none at {root_path!r}"
        )
    key, path = own[0]["state_key"], own[0]["root"]
    if len(models) > 1:
        state = {name: value for name, value in checkpoint[key].items() if is_inside(name, path)}
        checkpoint = {**checkpoint, key: state, SECTION: {**section, "adapters": own}}
    return checkpoint, {name_of(one): LoRAConfig.from_dict(one["config"]) for one in own}


def renaming(checkpoint: Mapping[str, Any], module: nn.Module, source: Any, state_key: str) -> Callable[[str], str]:
    """Return the function from a name in the file to the name in ``module``, where the root may sit elsewhere."""
    by_path = adapters_by_path(section_of(checkpoint, source), injected_roots(module), state_key, source)

    def rename(name: str) -> str:
        for path, (entry, *_) in by_path.items():
            if is_inside(name, entry["root"]):
                return joined(path, name.removeprefix(entry["root"]).removeprefix("."))
        return name

    return rename


def adapters_by_path(
    section: Mapping[str, Any], roots: Mapping[str, nn.Module], state_key: str, source: Any
) -> dict[str, list[dict[str, Any]]]:
    """Return the file's adapters by the path that their model has in the module: several only where they have names."""
    theirs: dict[str, list[dict[str, Any]]] = {}
    for entry in section["adapters"]:
        if entry["state_key"] == state_key:
            theirs.setdefault(entry["root"], []).append(entry)
    if len(theirs) == 1 == len(roots):
        return {next(iter(roots)): next(iter(theirs.values()))}
    if theirs.keys() != roots.keys():
        raise ValueError(f"{source} holds adapters for {list(theirs)}, the model has them at {list(roots)}")
    return theirs


def name_of(entry: Mapping[str, Any]) -> str:
    """Return the name of an adapter by its entry in a checkpoint's section; ``""`` for one without."""
    return str(entry["name"]) if entry.get("is_named") else ""


def only_key(section: Mapping[str, Any], source: Any) -> str:
    """Return the key in a checkpoint that the tensors of its only adapted module are under.

    Raises:
        ValueError: it holds several.
    """
    keys = {entry["state_key"] for entry in section["adapters"]}
    if len(keys) != 1:
        raise ValueError(f"{source} holds several adapted models, {sorted(keys)}; expected one")
    return str(next(iter(keys)))
