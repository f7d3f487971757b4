"""The tensors of a PEFT file: what their keys say, and how they are laid out."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_lora.model.names import clean_name

PREFIX = "base_model.model."
_KEY = re.compile(
    r"(?P<layer>.+?)\.(?:lora_(?P<embedding>embedding_)?(?P<factor>[AB])|(?P<magnitude>lora_magnitude_vector)"
    r"|(?P<values>lora_E)"
    r"|(?P<rows>token_adapter\.trainable_tokens_delta))(?P<adapter>\.(?!weight$|bias$)[^.]+)?(?P<end>\.weight|\.bias)?"
)


class Key(NamedTuple):
    """What a tensor is, by its key alone.

    Attributes:
        kind: ``"A"``, ``"B"``, ``"E"``, ``"magnitude"`` or ``"bias"`` of an adapted layer, ``"rows"`` of an embedding
            that train, a ``"base"`` tensor that did not train, a base tensor that is ``"trained"``, or ``"variant"``:
            of another method.
        name: of the layer, or of the base tensor, without PEFT's prefix.
        plain: the key without the adapter's name, which some tools leave in it.
    """

    kind: str
    name: str
    plain: str


def parse_key(key: str) -> Key:
    """Return what the tensor of this key in a PEFT file is."""
    name = clean_name(key.removeprefix(PREFIX))  # PEFT keeps the name that torch.compile puts in
    match = _KEY.fullmatch(name)
    if match is not None:
        kind = "variant"
        if match["factor"] and match["end"] == (None if match["embedding"] else ".weight"):
            kind = match["factor"]
        elif match["factor"] == "B" and match["end"] == ".bias":
            kind = "bias"
        elif match["values"] and match["end"] is None:
            kind = "E"
        elif match["magnitude"] or match["rows"]:
            kind = "magnitude" if match["magnitude"] else "rows"
        end = match["end"] or ""
        return Key(kind, match["layer"], key.removesuffix((match["adapter"] or "") + end) + end)
    if ".lora_" in name or ".token_adapter." in name:
        return Key("variant", name, key)
    is_copy = ".base_layer." in name and not name.endswith(".bias")
    return Key("base" if is_copy else "trained", name.replace(".base_layer.", "."), key)


def laid_out(layout: str, tensors: Sequence[Tensor]) -> Tensor:
    """Return one tensor in PEFT's layout, from tensors of the model.

    ``"plain"`` is the tensor itself. ``"experts_A"`` makes ``[E, r, in]`` expert-major rows ``[E r, in]``;
    ``"experts_B"`` makes ``[E, out, r]`` rank-major columns ``[out, r E]``. ``"residual_A"`` and ``"residual_B"`` put
    an adapter and its start under one another, ``[A; A0]`` and ``[B, -B0]``: the difference from the original base.
    ``"rows_<first>_<count>_<all>"`` takes so many rows from the first on of every ``all``: q of a stack of q, k and v.
    ``"padded_<dim>_<size>"`` has zeros at the end of a dimension, up to a size. ``"half_<layout>"`` is half of it, for
    what PEFT adds twice: see :func:`times_added`.
    """
    first = tensors[0]
    if layout.startswith("half_"):
        return laid_out(layout.removeprefix("half_"), tensors) / 2
    if layout == "experts_A":
        return first.flatten(0, 1)
    if layout == "experts_B":
        return first.permute(1, 2, 0).flatten(1)
    if layout == "residual_A":
        return torch.cat([first, tensors[1]])
    if layout == "residual_B":
        return torch.cat([first, -tensors[1]], dim=1)
    if layout.startswith("padded_"):
        dim, size = map(int, layout.split("_")[1:])
        shape = list(first.shape)
        shape[dim] = size - shape[dim]
        return torch.cat([first, first.new_zeros(shape)], dim=dim)
    if layout.startswith("rows_"):
        start, count, group = map(int, layout.split("_")[1:])
        return first.view(-1, group, *first.shape[1:])[:, start : start + count].flatten(0, 1).contiguous()
    assert layout == "plain", layout
    return first


def put_back(layout: str, value: Tensor, into: Tensor) -> None:
    """Copy a tensor in PEFT's layout into the model's tensor that :func:`laid_out` takes first.

    Zeros of the layout, and its second tensor, have no place there: compare ``laid_out(...)`` with ``value``.
    """
    if layout.startswith("half_"):
        put_back(layout.removeprefix("half_"), 2 * value, into)
    elif layout in ("experts_A", "experts_B"):
        is_A = layout == "experts_A"
        into.copy_(value.view(into.shape) if is_A else value.unflatten(1, (into.shape[2], -1)).permute(2, 0, 1))
    elif layout.startswith("rows_"):
        start, count, group = map(int, layout.split("_")[1:])
        rows = value.view(-1, count, *value.shape[1:])
        into.view(-1, group, *into.shape[1:])[:, start : start + count] = rows
    else:  # plain, or with more at the end of a dimension
        into.copy_(value[tuple(map(slice, into.shape))])


def unstacked(A: Tensor, B: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Return A ``[E, r, in]`` and B ``[E, out, r]`` from PEFT's expert-major rows and rank-major columns."""
    return A.unflatten(0, (-1, r)), B.unflatten(1, (r, -1)).permute(2, 0, 1)


def is_projection(name: str, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a layer is the output projection of an ``nn.MultiheadAttention``, which is adapted with the attention."""
    return isinstance(modules.get(name.rpartition(".")[0]), nn.MultiheadAttention)


def times_added(config: Mapping[str, Any]) -> int:
    """Return how often PEFT adds the update of ``out_proj`` of an adapted ``nn.MultiheadAttention``: twice.

    So do all versions that adapt attentions, 0.15 to 0.21: their ``MultiheadAttention.merge``
    (``peft/tuners/lora/layer.py``) adds the update to the weight and then calls ``out_proj.merge``, which adds it
    again (huggingface/peft#3774). Files therefore hold half of B.

    Raises:
        ValueError: a later version wrote the file.
    """
    version = str(config.get("peft_version") or "0.21")
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is None or (int(numbers[1]), int(numbers[2])) > (0, 21):
        raise ValueError(
            f"peft_version={version!r} adapted an nn.MultiheadAttention. PEFT 0.15 to 0.21 add the update of its "
            "out_proj twice, and of others that is unknown here: upgrade lightning_lora, or, if that PEFT adds it "
            "twice too, set peft_version to '0.21' in adapter_config.json"
        )
    return 2
