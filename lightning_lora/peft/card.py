"""The model card beside a portable adapter: which base it is for, and in which form that was trained over.

The Hub and PEFT keep such facts in ``README.md``. PEFT, vLLM, SGLang and llama.cpp read none of it, and unknown fields
of ``adapter_config.json`` make PEFT warn.
"""

import json
import os
from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import nn

from lightning_lora.checkpoint.atomic_io import write_atomically
from lightning_lora.checkpoint.storage import location
from lightning_lora.layers.host import Hosted
from lightning_lora.layers.plain_weight import stored_kind, stored_names

CARD_NAME = "README.md"


def forms_of(root: nn.Module) -> dict[str, int]:
    """Return how many weights of a base are stored in each form other than plain numbers."""
    modules = [module for module in root.modules() if not isinstance(module, Hosted)]
    kinds = (stored_kind(module, name) for module in modules for name in stored_names(module))
    return dict(Counter(kind for kind in kinds if kind is not None))


def write_card(directory: str | os.PathLike[str], config: Mapping[str, Any], metadata: Mapping[str, Any]) -> None:
    """Write ``README.md`` into a directory that has none."""
    path = location(directory) / CARD_NAME
    if not path.is_file():
        write_atomically(path, card(config, metadata).encode())


def card(config: Mapping[str, Any], metadata: Mapping[str, Any]) -> str:
    """Return a model card for an adapter.

    Args:
        config: the content of ``adapter_config.json``.
        metadata: what the file of tensors says beside them.
    """
    base, forms = config.get("base_model_name_or_path"), metadata.get("trained_over") or {}
    header = [*([f"base_model: {json.dumps(base)}"] if base else []), "library_name: peft", "tags:", "- lora"]
    lines = ["---", *header, "---", "", "# LoRA adapter", ""]
    lines.append(f"It is for the base model `{base}`." if base else "Its base model has no name.")
    if forms:
        stored = ", ".join(f"{number} weights in `{kind}`" for kind, number in forms.items())
        lines.append(
            f"It was trained over that base with {stored}. Over the original weights the adapter meets the difference "
            'between both for the first time: `merge(model, base="path/of/the/original")` of lightning-lora says how '
            "large it is beside the update."
        )
    return "\n".join(lines) + "\n"
