"""Find adapters that hold NaN or infinity where files are written and read."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from torch import Tensor

OnNonfinite = Literal["error", "warn"]


def check_finite(tensors: Mapping[str, Any], where: Any, on_nonfinite: OnNonfinite) -> None:
    """Look for the first tensor that holds NaN or infinity, and raise ``ValueError`` or warn with its name.

    Args:
        where: the file or directory that is written or read.
    """
    if on_nonfinite not in ("error", "warn"):
        raise ValueError(f"on_nonfinite={on_nonfinite!r} is not known; expected 'error' or 'warn'")
    name = first_nonfinite(tensors)
    if name is None:
        return
    message = (
        f"{where}: {name!r} holds NaN or infinity, and so would every output of the model. Has the run diverged? Go "
        "back to an earlier checkpoint"
    )
    if on_nonfinite == "error":
        raise ValueError(
            f"{message}, or take it as it is: on_nonfinite='warn' is an option of LoRACallback, save_peft, load_peft, "
            "load_adapter_state_dict, convert and combine"
        )
    rank_zero_warn(message)


def first_nonfinite(tensors: Mapping[str, Any]) -> str | None:
    """Return the name of the first tensor that holds NaN or infinity; tensors on the meta device hold nothing."""
    return next(
        (
            name
            for name, value in tensors.items()
            if isinstance(value, Tensor)
            and (value.is_floating_point() or value.is_complex())
            and not value.is_meta
            and not bool(torch.isfinite(value).all())
        ),
        None,
    )
