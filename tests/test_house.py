"""The house: every file imports only from its own floor or a lower one, and Megatron registers itself."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "lightning_lora"
FLOORS = [
    "adalora", "config", "compat", "ops", "layers", "fuse", "model", "checkpoint", "peft", "distributed", "megatron",
    "strategies", "callback", "sweep", "fabric", "__init__",
]  # fmt: skip
# the strategy for the Trainer, its twin for Fabric, and the names that users import
SERVE_MEGATRON = {"strategies/shared/megatron.py", "fabric.py", "__init__.py"}


def floor_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[str]:
    """Yield what a file imports, inside functions too, as dotted names."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_imports_from_its_own_floor_or_a_lower_one(path: Path) -> None:
    own = FLOORS.index(floor_of(path))
    for name in imports(path):
        if name.startswith("lightning_lora."):
            floor = name.split(".")[1]
            if str(path.relative_to(PACKAGE)) == "config.py" and floor == "peft":
                continue  # LoRAConfig.from_peft and to_peft, which import it when they are called
            if floor in FLOORS:  # else a public name of the package, which only __init__ may hand out
                assert FLOORS.index(floor) <= own, name
            else:
                assert floor_of(path) == "__init__", name
            if floor == "megatron" and floor_of(path) != "megatron":
                assert str(path.relative_to(PACKAGE)) in SERVE_MEGATRON, name


def test_every_floor_is_known() -> None:
    assert {floor_of(path) for path in FILES} <= set(FLOORS)
