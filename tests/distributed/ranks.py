"""``@on_ranks(2)``: the body of a test, or of a fixture, runs on gloo ranks that know of one another as under torchrun."""

import functools
import inspect
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.launch import run, torchrun_variables

_bodies: dict[str, Callable[..., Any]] = {}  # by module and name


def on_ranks(*num_ranks: int, **options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Run the decorated function once on each rank, with the values that pytest has for its arguments.

    An exception on a rank fails the test with that rank's traceback. Values travel pickled: paths, numbers, tensors.
    A decorated fixture is the list of what each rank returned.

    Args:
        num_ranks: a test is repeated for each; without any, the function's argument ``num_ranks`` says how many.
        options: of :func:`tests.distributed.launch.run`.
    """

    def decorate(body: Callable[..., Any]) -> Callable[..., Any]:
        name = f"{body.__module__}:{body.__qualname__}"
        _bodies[name] = body
        signature = inspect.signature(body)
        takes_number = "num_ranks" in signature.parameters

        @functools.wraps(body)
        def launched(*args: Any, **kwargs: Any) -> list[Any] | None:
            number = kwargs["num_ranks"] if takes_number or len(num_ranks) > 1 else num_ranks[0]
            if not takes_number:
                kwargs.pop("num_ranks", None)
            returned = _returned(name, number, (args, kwargs), options)
            return None if all(value is None for value in returned) else returned

        if len(num_ranks) < 2:
            return launched
        if not takes_number:
            parameter = inspect.Parameter("num_ranks", inspect.Parameter.KEYWORD_ONLY, annotation=int)
            launched.__signature__ = signature.replace(  # type: ignore[attr-defined]
                parameters=[*signature.parameters.values(), parameter]
            )
        return pytest.mark.parametrize("num_ranks", num_ranks)(launched)

    return decorate


def _returned(name: str, num_ranks: int, arguments: Any, options: dict[str, Any]) -> list[Any]:
    """Run a body on all ranks; return what each of them returned."""
    with tempfile.TemporaryDirectory() as directory:
        torch.save(arguments, Path(directory) / "arguments.pt")
        module, _ = name.split(":")
        run("rank.py", torchrun_variables(num_ranks), Path(directory), name, directory, module=module, **options)
        return [torch.load(Path(directory) / f"rank{rank}.pt", weights_only=False) for rank in range(num_ranks)]


def run_body(name: str, directory: Path) -> None:
    """Run a body whose module is imported, on this rank."""
    args, kwargs = torch.load(directory / "arguments.pt", weights_only=False)
    torch.save(_bodies[name](*args, **kwargs), directory / f"rank{os.environ['RANK']}.pt")
