"""One of several named adapters, seen as if it were the model's only one and had no name: for files and servers.

Whoever describes, writes or reads an adapter takes a model with one adapter. A model with several is seen once for each
of them: the modules of such a view are shallow copies, and its tensors are the model's own.
"""

import dataclasses
from typing import Any

from torch import nn

from lightning_lora.layers import LoRALayer
from lightning_lora.layers.class_swap import lora_class
from lightning_lora.layers.host import Host
from lightning_lora.model.names import listed
from lightning_lora.model.spread import reshard, without_fsdp
from lightning_lora.model.state import require_injection, uncompiled


def each_adapter(root: nn.Module) -> dict[str, nn.Module]:
    """Return an adapted model as each of its adapters sees it, by name: itself, as ``""``, if its one has no name."""
    return {name: _seen_alone(root, name) if name else root for name in require_injection(root).plans}


def chosen_adapter(root: nn.Module, adapter: str | None) -> nn.Module:
    """Return an adapted model as the adapter called ``adapter`` sees it: a view for reading names and tensors.

    Args:
        adapter: its name; ``None`` for the only one.

    Raises:
        ValueError: there is no such adapter, or there are several and none is named.
    """
    named, model = list(require_injection(root).named), type(root).__name__
    if adapter is not None and not named:
        raise ValueError(f"adapter={adapter!r} is not known: the adapter of {model} has no name. Leave adapter out")
    if adapter is None and len(named) > 1:
        raise ValueError(f"{model} has several adapters: give adapter= one of {listed([*map(repr, named)])}")
    if adapter is not None and adapter not in named:
        raise ValueError(f"adapter={adapter!r} is not known: {model} has {listed([*map(repr, named)])}")
    return _seen_alone(root, adapter or named[0]) if named else root


def _seen_alone(root: nn.Module, name: str) -> nn.Module:
    root = uncompiled(root)
    injection = require_injection(root)
    reshard(root)
    seen = _copied(root, name, {})
    seen.__dict__["lora_injection"] = dataclasses.replace(injection, plan=injection.named[name].plan, named={})
    return seen


def _copied(module: nn.Module, name: str, done: dict[nn.Module, nn.Module]) -> nn.Module:
    """Return a shallow copy of ``module`` and all below it, in which a host of the adapter is adapted itself."""
    if module in done:
        return done[module]
    adapter = module.adapters.get(name) if isinstance(module, Host) else None
    seen = done[module] = nn.Module.__new__(_class_of(module, adapter))
    seen.__dict__.update(vars(module))
    children = dict(module._modules)
    if isinstance(module, Host):
        del children["lora"]
    if adapter is not None:
        own: dict[str, Any] = {key: value for key, value in vars(adapter).items() if _is_adapters(key)}
        own["_parameters"] = {**module._parameters, **dict(adapter.named_adapter_tensors())}
        seen.__dict__.update(own)
        del seen.__dict__["lora_host"]
        children |= adapter._modules
    seen.__dict__["_modules"] = {
        local: None if child is None else _copied(child, name, done) for local, child in children.items()
    }
    return seen


def _class_of(module: nn.Module, adapter: LoRALayer | None) -> type[nn.Module]:
    if not isinstance(module, Host):
        return without_fsdp(type(module))
    if adapter is None:
        return module.lora_base_class
    return lora_class(type(adapter).__bases__[0], module.lora_base_class)


def _is_adapters(attribute: str) -> bool:
    """Whether an attribute is one that adapting a layer gives it."""
    return attribute.startswith("lora_") or attribute in ("adapter_names", "frozen_names")
