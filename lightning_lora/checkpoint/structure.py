"""Compare the layers, ranks and scales that a file was written with, and what trains whole, with a model's own."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from lightning_lora.checkpoint.file import structure
from lightning_lora.model.names import listed


def check_structure(adapter: Mapping[str, Any], root: nn.Module, source: Any) -> None:
    """Compare a file's :func:`structure` with that of ``root``.

    Raises:
        ValueError: a layer, rank, scale, row or what trains whole differs. The message says where.
    """
    ours = structure(root)
    _check_same_names("adapted layers", adapter["layers"], ours["layers"], source)
    if adapter.get("prunes_ranks", False) != ours["prunes_ranks"]:
        remedy = "leave adalora out" if ours["prunes_ranks"] else "give adalora=AdaLoRA(...)"
        raise ValueError(f"one of {source} and the model is adapted by AdaLoRA, and the other is not: {remedy}")
    for name, (r, scaling) in adapter["layers"].items():
        own_r, own_scaling = ours["layers"][name]
        if r != own_r:
            raise ValueError(
                f"{source} has r={r} at {name!r}, the model has r={own_r}: adapt the model with the file's rank"
            )
        if abs(scaling - own_scaling) > 1e-9 * abs(scaling):
            raise ValueError(
                f"{source} scales {name!r} by {scaling:g}, the model by {own_scaling:g}: adapt it with the file's "
                "alpha and use_rslora, or convert() an older file with an nn.MultiheadAttention and load_peft() that"
            )
    rows = adapter.get("token_rows", {})
    if rows != ours["token_rows"]:
        raise ValueError(
            f"{source} trains rows {_short(rows)} of embeddings, the model {_short(ours['token_rows'])}: adapt it "
            "with the file's trainable_token_indices"
        )
    _check_same_names("tensors that train whole", adapter["trained_whole"], ours["trained_whole"], source)


def _short(rows: Mapping[str, list[int]]) -> str:
    return ", ".join(f"{name}: {ids[:5]}{' ...' if len(ids) > 5 else ''}" for name, ids in rows.items()) or "none"


def _check_same_names(what: str, theirs: Any, ours: Any, source: Any) -> None:
    missing, extra = [n for n in ours if n not in theirs], [n for n in theirs if n not in ours]
    if missing or extra:
        raise ValueError(
            f"{source} and the model differ in their {what}: {quoted(extra)} only in the file, {quoted(missing)} "
            "only in the model. Use the target_modules, modules_to_save and bias that the file was written with"
        )


def quoted(names: list[str]) -> str:
    """Return the first names in quotes, for an error; ``nothing`` without any."""
    return listed([repr(name) for name in names], 3) or "nothing"
