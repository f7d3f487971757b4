"""Long values shortened for messages."""

from collections.abc import Sequence
from reprlib import Repr

_BRIEF = Repr()
_BRIEF.maxlist = _BRIEF.maxtuple = _BRIEF.maxset = _BRIEF.maxdict = 6
_BRIEF.maxstring = _BRIEF.maxother = 120


def brief(value: object) -> str:
    """Return ``repr(value)``, of a long list or text its beginning."""
    return _BRIEF.repr(value)


def listed(names: Sequence[str], most: int = 6) -> str:
    """Return the names, of many the first ``most`` and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
