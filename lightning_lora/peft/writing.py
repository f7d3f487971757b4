"""Write the directories of one or several adapters that :func:`describe_for_peft` described."""

import os
from collections.abc import Mapping
from typing import Any, TypeAlias

from torch import Tensor

from lightning_lora.checkpoint.storage import Location, local_directory, location
from lightning_lora.model.state import OnNonfinite, check_finite
from lightning_lora.peft.card import write_card
from lightning_lora.peft.config import kind_of
from lightning_lora.peft.contents import contents
from lightning_lora.peft.directory import Files, write_directory

Described: TypeAlias = tuple[Mapping[str, Any], Mapping[str, Tensor]]  # a description, and the tensors that it names


def folder_of(directory: str | os.PathLike[str], name: str) -> Location:
    """Return where an adapter is written: with a name in a folder of that name."""
    return location(directory) / name if name else location(directory)


def write_described(
    described: Mapping[Location, Described],
    *,
    portable: bool = False,
    as_lora: bool = False,
    on_nonfinite: OnNonfinite = "error",
) -> None:
    """Write directories from what :func:`describe_for_peft` returned and the model's tensors by name, all or none.

    Raises:
        ValueError: PEFT would read the adapters of experts as something else; ``portable=True`` is then the way.
    """
    made: dict[Location, Files] = {}
    for directory, (description, named) in described.items():
        config, pairs = contents(description, named, portable=portable, as_lora=as_lora)
        if kind_of(description["config"]) == "ADALORA" and (portable or as_lora):
            check_finite(
                named, directory, on_nonfinite
            )  # pruned ranks, which are not written, are part of every output
        seen: set[int] = set()
        tensors: dict[str, Tensor] = {}
        for key, value in pairs:
            shared = (
                value.data_ptr() in seen
            )  # a tied tensor under its second name: safetensors wants memory of its own
            tensors[key] = value.clone() if shared else value
            seen.add(value.data_ptr())
        check_finite(tensors, directory, on_nonfinite)
        made[directory] = Files(config, tensors, description["metadata"])
    for directory, files in made.items():
        write_directory(directory, files)
        if portable:
            write_card(directory, files.config, files.metadata)


def write_tokenizer(tokenizer: Any, directory: str | os.PathLike[str]) -> None:
    """Save a tokenizer beside an adapter, if it is one."""
    if callable(save := getattr(tokenizer, "save_pretrained", None)):
        with local_directory(location(directory)) as folder:
            save(folder)
