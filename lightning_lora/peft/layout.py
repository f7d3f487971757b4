"""Convert tensors between the layout of a model and that of a PEFT file."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Entry(NamedTuple):
    """How one tensor of the file is made from tensors of the model: see :func:`laid_out`."""

    key: str
    layout: str
    names: Sequence[str]


def laid_out(layout: str, tensors: Sequence[Tensor]) -> Tensor:
    """Return one tensor in PEFT's layout.

    ``"plain"`` is the tensor itself. ``"experts_A"`` makes ``[E, r, in]`` expert-major rows ``[E r, in]``;
    ``"experts_B"`` makes ``[E, out, r]`` rank-major columns ``[out, r E]``. ``"residual_A"`` and ``"residual_B"`` put
    an adapter and its start under one another, ``[A; A0]`` and ``[B, -B0]``: the difference from the original base.
    ``"rows_<first>_<count>_<all>"`` takes so many rows from the first on of every ``all``: q of a stack of q, k and v.
    ``"half_<layout>"`` is half of that, for what PEFT adds twice: see :func:`times_added`.
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
    if layout.startswith("rows_"):
        start, count, group = map(int, layout.split("_")[1:])
        return first.view(-1, group, *first.shape[1:])[:, start : start + count].flatten(0, 1).contiguous()
    assert layout == "plain", layout
    return first


def unstacked(A: Tensor, B: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Return A ``[E, r, in]`` and B ``[E, out, r]`` from PEFT's expert-major rows and rank-major columns."""
    return A.unflatten(0, (-1, r)), B.unflatten(1, (r, -1)).permute(2, 0, 1)


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
