"""Find the root: the pretrained model inside a user's module, where freezing, injection and export stay."""

from typing import Any

from torch import nn

from lightning_lora.compat.torch import compiled_module
from lightning_lora.model.families import family_of
from lightning_lora.model.names import clean_name


def find_root(module: nn.Module, path: str | None = None) -> tuple[str, nn.Module]:
    """Return ``(path, root)``: the module named ``path``, else the one pretrained model inside, else ``module``.

    Pretrained models are those of :mod:`lightning_lora.model.families`, transformers' and Megatron-core's.

    Raises:
        ValueError: nothing has that name, or there are several pretrained models to choose from.
    """
    if path is not None:
        try:
            root = module.get_submodule(path)
            return path, compiled_module(root) or root
        except AttributeError:
            children = ", ".join(name for name, _ in module.named_children()) or "none"
            raise ValueError(
                f"module={path!r} names nothing in {type(module).__name__}; its children are: {children}"
            ) from None
    found: dict[str, nn.Module] = {}
    for name, child in module.named_modules():
        if family_of(child) is not None and not any(name.startswith(f"{outer}.") or not outer for outer in found):
            found[name] = child
    if len(found) > 1:
        names = ", ".join(f"{name} ({type(child).__name__})" for name, child in found.items())
        raise ValueError(f'{type(module).__name__} holds several pretrained models: {names}. Choose with module="name"')
    return next(iter((clean_name(n), child) for n, child in found.items())) if found else ("", module)


def name_or_path(root: nn.Module) -> str | None:
    """Return where a transformers model says that its weights came from."""
    config: Any = getattr(root, "config", None)
    return getattr(config, "name_or_path", None) or None
