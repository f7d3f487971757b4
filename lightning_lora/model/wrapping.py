"""Wrap functions of other packages at the first use of adapters, and put them back with :func:`unwrap_all`.

Torch, Lightning and transformers offer no hook in some places that must know about adapters. There a function of
theirs is replaced by one that runs its own code before or after it. Where no adapters are involved, it behaves as ever.
"""

from collections.abc import Callable
from typing import Any

_MISSING = object()
_WRAPPED: dict[tuple[Any, str], tuple[Any, Any]] = {}  # (owner, name) -> (its former value, ours)
_AT_INJECTION: list[Callable[[], None]] = []


def wrap(owner: Any, name: str, wrapper: Callable[[Any], Any]) -> None:
    """Replace ``owner.name`` by ``wrapper(owner.name)``; a second call for the same name does nothing.

    Args:
        owner: a class or a module.
    """
    if (owner, name) not in _WRAPPED:
        former, ours = vars(owner).get(name, _MISSING), wrapper(getattr(owner, name))
        setattr(owner, name, ours)
        _WRAPPED[owner, name] = (former, ours)


def unwrap_all() -> None:
    """Put every function back that :func:`wrap` replaced, except where somebody else has replaced ours since."""
    for (owner, name), (former, ours) in _WRAPPED.items():
        if vars(owner).get(name) is ours and former is _MISSING:
            delattr(owner, name)
        elif vars(owner).get(name) is ours:
            setattr(owner, name, former)
    _WRAPPED.clear()


def at_injection(action: Callable[[], None]) -> Callable[[], None]:
    """Decorate a function that wraps something: it is called whenever a model is adapted in this process.

    That is by ``inject``, or because the adapted model was copied or came from another process.
    """
    _AT_INJECTION.append(action)
    return action


def run_at_injection() -> None:
    """Call what :func:`at_injection` decorates."""
    for action in _AT_INJECTION:
        action()
