"""How many attention heads the ranks that share a transformers model must divide among them."""

from typing import Any

from torch import nn

from lightning_lora.model.families import is_pretrained


def heads_of(module: nn.Module) -> list[int]:
    """Return the numbers of attention heads and of key-value heads of the transformers models inside ``module``."""
    return [heads for _, heads in _named_heads(module)]


def _named_heads(module: nn.Module) -> list[tuple[str, int]]:
    found: dict[tuple[str, int], None] = {}
    for part in module.modules():
        if is_pretrained(part):
            config: Any = part.config
            config = config.get_text_config() if hasattr(config, "get_text_config") else config
            for field in ("num_attention_heads", "num_key_value_heads"):
                if isinstance(getattr(config, field, None), int):
                    found[field, getattr(config, field)] = None
    return list(found)


def check_heads(root: nn.Module, ranks: int) -> None:
    """Raise ``ValueError`` where ``ranks`` do not divide a number of heads."""
    for field, heads in _named_heads(root):
        if heads % ranks:
            fits = [size for size in range(1, heads + 1) if heads % size == 0]
            raise ValueError(
                f"{field}={heads} of {type(root).__name__} is not divisible by tensor_parallel_size={ranks}; sizes "
                f"that divide it: {', '.join(map(str, fits))}"
            )
