"""Look up a private name of another package, or say which version of the package lacks it."""

import importlib
from importlib import metadata
from typing import Any


def private(package: str, owner: Any, name: str) -> Any:
    """Return ``owner.name``; ``owner`` may be the name of a module.

    Raises:
        ImportError: the installed version of ``package`` lacks it.
    """
    try:
        return getattr(importlib.import_module(owner) if isinstance(owner, str) else owner, name)
    except (AttributeError, ModuleNotFoundError) as error:
        raise missing(package, owner, name) from error


def missing(package: str, owner: Any, name: str) -> ImportError:
    """Return the error that names what an installed package lacks, and its version."""
    place = owner if isinstance(owner, str) else getattr(owner, "__name__", type(owner).__name__)
    return ImportError(
        f"lightning_lora uses {place}.{name}, which {package} {metadata.version(package)} lacks: install a version of "
        f"{package} in the range that lightning_lora's package metadata gives (pip show lightning-lora)"
    )
