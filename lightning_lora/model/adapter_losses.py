"""The loss of each named adapter: the mean over its own rows, or over its own labels."""

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor


def losses_by_adapter(
    losses: Tensor,
    names: Sequence[str | None] | Tensor,
    *,
    counts: Tensor | None = None,
    lengths: Sequence[int] | Tensor | None = None,
) -> dict[Hashable, Tensor]:
    """Return the mean loss of each adapter's own rows. The gradient of their sum is that of one run for each adapter.

    Args:
        losses: ``[rows]``, or ``[rows, ...]`` with a loss for each label, from a loss function with
            ``reduction="none"``.
        names: the adapter of each row, as :func:`~lightning_lora.active` takes it; rows of the base are left out. With
            a tensor the keys are its integers.
        counts: of the shape of ``losses``: True for those that count, such as ``labels != -100``. An adapter without
            any has a loss of zero.
        lengths: of packed segments, in the rows of ``losses``: then ``names`` has one entry for each segment.

    Raises:
        ValueError: the sizes do not fit one another.

    Example::

        losses = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")  # [rows, tokens]
        by_adapter = losses_by_adapter(losses, batch["adapter"], counts=labels != -100)
        loss = torch.stack([*by_adapter.values()]).sum()
    """
    keys: list[Hashable] = names.tolist() if isinstance(names, Tensor) else list(names)
    if lengths is not None:
        sizes = lengths.tolist() if isinstance(lengths, Tensor) else list(lengths)
        if len(sizes) != len(keys):
            raise ValueError(f"there are {len(keys)} names and {len(sizes)} lengths: expected is one for each segment")
        keys = [key for key, size in zip(keys, sizes, strict=True) for _ in range(size)]
    if losses.ndim == 0 or losses.shape[0] != len(keys):
        raise ValueError(f"losses of the shape {list(losses.shape)} are for other rows than {len(keys)} names")
    if counts is not None and counts.shape != losses.shape:
        raise ValueError(f"counts of the shape {list(counts.shape)} do not fit losses of {list(losses.shape)}")
    rows: dict[Hashable, list[int]] = {}
    for row, key in enumerate(keys):
        if key is not None and key != -1:
            rows.setdefault(key, []).append(row)
    found = {}
    for key, own in rows.items():
        index = torch.tensor(own, device=losses.device)
        mine = losses.index_select(0, index)
        if counts is None:
            found[key] = mine.mean()
        else:
            counted = counts.index_select(0, index).to(mine.dtype)
            found[key] = (mine * counted).sum() / counted.sum().clamp(min=1)
    return found
