"""Names of modules and parameters: cleaned, joined, compared, and listed in messages."""

import difflib
import re
from collections.abc import Collection, Iterable, Sequence

from torch import nn

from lightning_lora.compat.torch import COMPILED

# "q_proj.lora.law.lora_A" is the tensor "q_proj.lora_A" of the adapter "law"
_NAMED_ADAPTER = re.compile(r"(?P<layer>(?:.*\.)?)lora\.(?P<adapter>[A-Za-z0-9_-]+)\.(?P<local>lora_\w+)")
BASE = "__base__"  # what PEFT calls the base among the names of adapters


def clean_name(name: str) -> str:
    """Return a parameter's or module's name without the parts that ``torch.compile`` puts in."""
    if COMPILED not in name:
        return name
    return ".".join(part for part in name.split(".") if part != COMPILED)


def without_adapter(name: str) -> tuple[str, str]:
    """Return the name of an adapter's tensor without the name of the adapter, and that; ``""`` for one without."""
    match = _NAMED_ADAPTER.fullmatch(name)
    return (name, "") if match is None else (match["layer"] + match["local"], match["adapter"])


def joined(path: str, name: str) -> str:
    """Return the name that ``name`` inside ``path`` has; ``path`` may be empty."""
    return f"{path}.{name}" if path else name


def named_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return every module by its clean name; ``model`` itself comes first, as ``""``."""
    return {clean_name(name): module for name, module in model.named_modules()}


def is_inside(name: str, path: str) -> bool:
    """Whether a clean name is ``path`` or lies below it; everything lies below ``""``."""
    return not path or name == path or name.startswith(f"{path}.")


def is_inside_any(name: str, paths: Iterable[str]) -> bool:
    """Whether a clean name is one of ``paths`` or lies below one."""
    return any(is_inside(name, path) for path in paths)


def outermost(names: Collection[str]) -> list[str]:
    """Return the names that lie inside none of the others."""
    return [name for name in names if not any(name != other and is_inside(name, other) for other in names)]


def nearest_names(patterns: Iterable[str], names: Iterable[str]) -> str:
    """Return "; nearest: ..." with the names, or last parts of names, most like the patterns."""
    pool = ({name.rpartition(".")[2] for name in names} | set(names)) - {""}
    near = [name for pattern in patterns for name in difflib.get_close_matches(pattern, sorted(pool), n=3, cutoff=0.4)]
    return f"; nearest: {', '.join(near)}" if near else f"; there are: {', '.join(sorted(pool, key=len)[:10])}"


def listed(names: Sequence[str], most: int = 6) -> str:
    """Return the names, of many the first ``most`` and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
