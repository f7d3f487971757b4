"""Wrap Fabric's ``setup``, ``save`` and ``load``, so that its strategies know adapters.

A Fabric strategy is made before the model, and no callback of Fabric runs before its model is set up, saved or loaded.
Loading is wrapped at import, the rest at the first injection: a script that loads a file with adapters may have
forgotten to adapt its model.
"""

import functools
from typing import Any

from lightning.fabric import Fabric
from torch import nn

from lightning_lora.checkpoint.file import SECTION
from lightning_lora.checkpoint.reading import read_checkpoint
from lightning_lora.compat.lightning import unwrapped
from lightning_lora.model.state import injected_roots
from lightning_lora.model.wrapping import at_injection, wrap
from lightning_lora.strategies.fabric.adapter_only import adapted_modules, adopt_fabric
from lightning_lora.strategies.shared.bitsandbytes_precision import check_precision, convert_under_adapters


@at_injection
def wrap_fabric() -> None:
    """Make Fabric adopt its strategy where a model with adapters is set up or saved."""
    for name in ("setup", "setup_module", "save"):
        wrap(Fabric, name, _adopting)


@at_injection
def wrap_loading() -> None:
    """Make Fabric adopt its strategy where a model with adapters is loaded, and refuse their file for other models."""
    for name in ("load", "load_raw"):
        wrap(Fabric, name, _adopting)


def _adopting(method: Any) -> Any:
    """Return a method of Fabric that adopts the strategy first, if any of its arguments has adapters."""

    @functools.wraps(method)
    def adopting(self: Fabric, *args: Any, **kwargs: Any) -> Any:
        if any(_has_adapters(unwrapped(value)) for value in (*args, *kwargs.values())):
            adopt_fabric(self.strategy)
        if method.__name__ in ("setup", "setup_module"):
            module = unwrapped(args[0] if args else kwargs["module"])
            check_precision(self.strategy, self.strategy.precision)
            convert_under_adapters(self.strategy.precision, module)
        if getattr(self.strategy, "shards", False) and method.__name__ in ("setup", "setup_module"):
            module = args[0] if args else kwargs["module"]
            if any(parameter.is_meta for parameter in module.parameters()):
                kwargs.setdefault("move_to_device", False)  # the strategy does it, and Fabric would warn
        if method.__name__ == "save":
            _check_top_level(args[1] if len(args) > 1 else kwargs.get("state"))
        if method.__name__ in ("load", "load_raw"):
            return _loaded(functools.partial(method, self), *args, **kwargs)
        return method(self, *args, **kwargs)

    return adopting


def _loaded(load: Any, *args: Any, **kwargs: Any) -> Any:
    """Load a file; raise an error that says what to do if it holds adapters and no model in the state does."""
    path, state, *_ = (*args, *(kwargs[name] for name in ("path", "state", "obj") if name in kwargs), None, None)
    holders = list(state.values()) if isinstance(state, dict) else [state]
    is_bare = any(isinstance(one, nn.Module) for one in holders) and not any(map(_has_adapters, holders))
    advice = f"{path} holds adapters, and no model in the state has any: call inject(model, config) before fabric.setup"
    try:
        result = load(*args, **kwargs)
    except Exception:
        if is_bare and _holds_adapters(path):
            raise ValueError(advice) from None  # Lightning's lists every base weight as missing
        raise
    # not strict, Lightning drops the adapters; load_raw does not give back what is left
    if is_bare and (
        SECTION in result if result is not None else not kwargs.get("strict", True) and _holds_adapters(path)
    ):
        raise ValueError(advice)
    return result


def _holds_adapters(path: Any) -> bool:
    try:
        return SECTION in read_checkpoint(path)
    except (OSError, ValueError):
        return False


def _check_top_level(state: Any) -> None:
    """Raise ``ValueError`` for an adapted model inside a nested container, which Fabric would pickle with its base."""
    for key, value in state.items() if isinstance(state, dict) else ():
        inner = list(value.values()) if isinstance(value, dict) else value
        if isinstance(inner, (list, tuple)) and any(_has_adapters(unwrapped(one)) for one in inner):
            raise ValueError(
                f"state[{key!r}] holds an adapted model inside a container: put it at the top of the state"
            )


def _has_adapters(value: Any) -> bool:
    return bool(injected_roots(value) if isinstance(value, nn.Module) else adapted_modules(value))
