"""Find the adapters in a directory, by name where it has several, and read each one."""

from torch import nn

from lightning_lora.checkpoint.storage import Location
from lightning_lora.model.adapters import check_name
from lightning_lora.model.names import listed
from lightning_lora.model.state import OnNonfinite, check_finite, injection_of
from lightning_lora.peft.adalora import with_all_ranks
from lightning_lora.peft.config import CONFIG_NAME, checked, kind_of
from lightning_lora.peft.diffusers import DIFFUSERS_NAME, read_diffusers
from lightning_lora.peft.directory import Adapter, read_files, sorted_tensors


def folders_of(model: nn.Module, directory: Location, adapter: str | None) -> dict[str, Location]:
    """Return the directories to load by the names that their adapters get, ``""`` for none.

    Raises:
        ValueError: a name is taken, or cannot be one, or several adapters need one.
    """
    injection = injection_of(model)
    named = {} if injection is None else injection.named
    is_flat = any((directory / name).is_file() for name in (CONFIG_NAME, DIFFUSERS_NAME))
    inside: list[Location] = [*directory.iterdir()] if directory.is_dir() else []
    below = {folder.name: folder for folder in inside if (folder / CONFIG_NAME).is_file()}
    if adapter is not None:
        folders = {adapter: directory if is_flat else below.get(adapter, directory)}
    elif is_flat or not below:
        if named:
            raise ValueError(
                f"{type(model).__name__} has adapters with names, {listed(list(named))}: give the one in {directory} a "
                "name with load_peft(model, directory, adapter=name)"
            )
        return {"": directory}
    else:
        folders = dict(sorted(below.items()))
    for name in folders:
        check_name(name)
        if name in named:
            raise ValueError(
                f"there is an adapter {name!r}: call remove(model, adapter={name!r}) first, or hot_swap(model, "
                f"directory, adapter={name!r}) to copy values alone"
            )
    return folders


def read_adapter(directory: Location, component: str | None, on_nonfinite: OnNonfinite) -> Adapter:
    """Return what a directory holds, sorted, after checking its config and values."""
    is_diffusers = (directory / DIFFUSERS_NAME).is_file() and not (directory / CONFIG_NAME).is_file()
    files = read_diffusers(directory, component) if is_diffusers else read_files(directory)
    config = checked(files.config, directory / (DIFFUSERS_NAME if is_diffusers else CONFIG_NAME))
    files = files._replace(config=config)
    files = with_all_ranks(files, directory) if kind_of(config) == "ADALORA" else files
    adapter = sorted_tensors(files, directory)
    check_finite(files.tensors, directory, on_nonfinite)
    return adapter
