"""Compare the base tensors that a PEFT directory holds with a model's own."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lightning_lora.model.families import resize_advice
from lightning_lora.model.names import clean_name
from lightning_lora.model.state import require_injection
from lightning_lora.peft.directory import Adapter
from lightning_lora.peft.settings import is_value, trained_a_copy


def check_trained(model: nn.Module, adapter: Adapter) -> list[tuple[Tensor, int, Tensor]]:
    """Check the base tensors in a directory: those that trained must fit, untrained copies must be the model's own.

    Returns:
        ``(table, first row, rows)`` for every embedding whose copy differs in its last rows: rows that were added.
    """
    own = named_tensors(model)
    for name, value in (adapter.trained | adapter.base).items():
        if name not in own:
            raise ValueError(
                f"{adapter.source} holds {name!r}, which {type(model).__name__} lacks: another base model?"
            )
        if value.shape != own[name].shape:
            hint = resize_advice(model, name, value.shape, own[name].shape)
            raise ValueError(
                f"{adapter.source} has {tuple(value.shape)} for {name!r}, the model has {tuple(own[name].shape)}{hint}"
            )
        if value.is_floating_point() != own[name].is_floating_point():  # a batch normalisation counts its batches
            raise ValueError(f"{adapter.source} has {value.dtype} for {name!r}, the model has {own[name].dtype}")
    tails: list[tuple[Tensor, int, Tensor]] = []
    for name, value in adapter.base.items():
        if own[name].device.type == "meta":
            continue
        differs = value.bfloat16() != own[name].detach().cpu().bfloat16()
        if not bool(differs.any()):
            continue
        first = int(differs.flatten(1).any(1).nonzero()[0]) if value.ndim > 1 else 0
        if first < value.shape[0] // 2:
            raise ValueError(
                f"{adapter.source} brings its own base tensor {name!r}, which differs from the model's (a trained "
                "embedding, or another base): load that base first"
            )
        tails.append((own[name].detach(), first, value[first:]))
    return tails


def check_ties(model: nn.Module, adapter: Adapter, modules: Mapping[str, nn.Module]) -> None:
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


def untrained_values(model: nn.Module, adapter: Adapter) -> list[str]:
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


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return all parameters under all of their clean names, and buffers."""
    return {clean_name(n): t for n, t in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]}


def set_copies_apart(adapter: Adapter, modules: Mapping[str, nn.Module]) -> None:
    """Move embeddings and heads that did not train, which PEFT may copy into the file, from ``trained`` to ``base``."""
    for name in list(adapter.trained):
        owner, _, local = name.rpartition(".")
        if local == "weight" and not is_whole(owner, adapter) and owner in modules:
            adapter.base[name] = adapter.trained.pop(name)


def is_whole(owner: str, adapter: Adapter) -> bool:
    """Whether a module lies in one whose name ends with an entry of ``modules_to_save``."""
    return any(f"{entry}." in f"{owner}." for entry in adapter.config.get("modules_to_save") or ())
