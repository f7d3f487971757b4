"""``convert``: write a PEFT directory from an adapter checkpoint, without the model."""

import os
from collections.abc import Mapping
from typing import Any

from lightning_lora.checkpoint.reading import read_checkpoint, section_of
from lightning_lora.model.state import OnNonfinite
from lightning_lora.model.summary import outside_names, say_left_out
from lightning_lora.peft.save import write_described


def convert(
    checkpoint: str | os.PathLike[str],
    directory: str | os.PathLike[str],
    *,
    portable: bool = False,
    on_nonfinite: OnNonfinite = "error",
) -> None:
    """Turn an adapter checkpoint into a PEFT directory, with neither the base nor the model's code at hand.

    What trained outside the adapted model is left out, and named in one line.

    Args:
        checkpoint: a file of Trainer, Fabric or ``torch.save(adapter_checkpoint(model), path)``. It and the directory
            may be URLs.
        portable: as in :func:`save_peft`.
        on_nonfinite: what to do about an adapter that holds NaN or infinity.

    Raises:
        ValueError: the file is damaged, holds no adapter or several, what PEFT's format cannot express, or NaN or
            infinity.
    """
    content = read_checkpoint(checkpoint)
    adapters = section_of(content, checkpoint)["adapters"]
    if len(adapters) != 1:
        raise ValueError(
            f"{checkpoint} holds {len(adapters)} adapters, at {[a['root'] for a in adapters]}; expected one. Load them "
            "into their models and call save_peft on each"
        )
    adapter = adapters[0]
    write_adapter(content, adapter, directory, checkpoint, portable=portable, on_nonfinite=on_nonfinite)
    outside = outside_names(content[adapter["state_key"]], adapter["root"])
    say_left_out(directory, outside, f"It is in {checkpoint}, under {adapter['state_key']!r}")


def write_adapter(
    checkpoint: Mapping[str, Any],
    adapter: Mapping[str, Any],
    directory: str | os.PathLike[str],
    source: Any,
    *,
    portable: bool = False,
    on_nonfinite: OnNonfinite = "error",
) -> None:
    """Write one adapter of a checkpoint's content as a PEFT directory.

    Args:
        adapter: its entry in the checkpoint's section.
        source: where the content is from, for messages.
    """
    description = adapter.get("peft")
    if description is None or "refused" in description:
        why = (description or {}).get("refused", "it was written before checkpoints held what a conversion needs")
        raise ValueError(f"{source} cannot be converted: {why}. Load it into its model and call save_peft or merge")
    prefix = f"{adapter['root']}." if adapter["root"] else ""
    state = checkpoint[adapter["state_key"]]
    named = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    write_described(description, named, directory, portable=portable, on_nonfinite=on_nonfinite)
