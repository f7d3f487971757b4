"""Every class of the installed transformers that is fused, and that none of the recorded ones stopped to be.

``fused_classes.txt`` holds a line per class: what it is fused as, its file, its name. ``python -m
tests.fuse.test_transformers`` prints the lines of the installed version.
"""

import importlib
import inspect
import warnings
from collections.abc import Iterator
from pathlib import Path

import transformers
from torch import nn

from lightning_lora.fuse.expert_forms import LOOPS, OWN_GATES, default_gate
from lightning_lora.fuse.forms import GATED_FORMS, form_of
from lightning_lora.fuse.norms import NORM_FORMS
from lightning_lora.layers.same_code import same_code

RECORDED = Path(__file__).with_name("fused_classes.txt")


def classes() -> Iterator[type[nn.Module]]:
    """The classes of modules of every modeling file that can be imported here."""
    for path in sorted(Path(transformers.__file__).parent.glob("models/*/modeling_*.py")):
        name = f"transformers.models.{path.parent.name}.{path.stem}"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                module = importlib.import_module(name)
            except ImportError:  # it needs a package that is not here
                continue
        for cls in vars(module).values():
            if inspect.isclass(cls) and issubclass(cls, nn.Module) and cls.__module__ == name:
                yield cls


def kind_of(cls: type[nn.Module]) -> str | None:
    if form_of(cls, GATED_FORMS) is not None:
        return "gated MLP"
    if form_of(cls, NORM_FORMS) is not None:
        return "norm"
    gate = getattr(cls, "_apply_gate", None)
    if not any(same_code(gate, known) for known in (default_gate, *OWN_GATES)):
        return None
    loop = any(same_code(getattr(cls.forward, "__wrapped__", None), known) for known in LOOPS)
    return "experts" if loop else "experts, not eager"


def lines() -> list[str]:
    found = ((kind_of(cls), cls) for cls in classes())
    return [
        f"{kind}: {cls.__module__.removeprefix('transformers.models.')} {cls.__name__}" for kind, cls in found if kind
    ]


def test_no_class_that_was_fused_stopped_to_be() -> None:
    found, names = set(lines()), {f"{cls.__module__} {cls.__name__}" for cls in classes()}
    print(*sorted(found), sep="\n")
    recorded = RECORDED.read_text().splitlines()
    here = {line for line in recorded if f"transformers.models.{line.partition(': ')[2]}" in names}
    assert here - found == set()
    assert len(here) > 300  # and it is not the list that is empty


if __name__ == "__main__":
    print(*lines(), sep="\n")
