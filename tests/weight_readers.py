"""A search of source code for modules that read the weight of a layer inside them, instead of calling the layer."""

import ast
import re
from collections import ChainMap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

# whose adapters have a weight to read
KINDS = {"Linear": "linear", "Conv1D": "linear", "NonDynamicallyQuantizableLinear": "linear", "Embedding": "embedding"}
KINDS |= {f"Conv{n}d": "convolution" for n in (1, 2, 3)}
FACTS = {"data_ptr", "device", "dim", "dtype", "is_meta", "ndim", "numel", "requires_grad", "shape", "size"}
# what runs when a model is built, and what is called to change its size
NOT_IN_FORWARD = ("__init__", "init", "_init", "reset", "_reset", "resize", "_resize", "_get_resized", "tie", "set_")
NOT_IN_FORWARD += ("_copy", "initialize", "_set_", "_get_qa", "replace_", "_make_linear", "my_convert", "prune")
# a line that may read one: no name of a tensor in quotes, no random start, no parameter of the module's own
_ASKED = "|".join(sorted(FACTS))
MAY_READ = re.compile(
    rf"""(?!.*(init\.|norm\w*\.weight))[^"#]*([\w\])](?<!\bself)(?<!module)\.weight\b(?!\.({_ASKED}))"""
    r"""|getattr\(.*"weight")""",
    re.IGNORECASE,
)


class Read(NamedTuple):
    """One reading of a weight: ``owner`` is the class, ``path`` leads from it to the layer, or is a local name."""

    owner: str
    path: str
    kind: str  # a value of KINDS; "unknown" where the code does not say what the layer is


def reads(directory: Path, pattern: str) -> set[Read]:
    """Return what the files below a directory read of layers that can be adapted."""
    texts = [file.read_text() for file in sorted(directory.rglob(pattern))]
    trees = [ast.parse(text) for text in texts if any(map(MAY_READ.match, text.splitlines()))]
    own = [{node.name: node for node in tree.body if isinstance(node, ast.ClassDef)} for tree in trees]
    all_classes = {name: node for classes in own for name, node in classes.items()}
    found = {read for classes in own for node in classes.values() for read in _of(node, ChainMap(classes, all_classes))}
    functions = [node for tree in trees for node in tree.body if isinstance(node, ast.FunctionDef)]
    return found | {
        Read(f"{function.name}()", path, "unknown")
        for function in functions
        if not function.name.startswith(NOT_IN_FORWARD)
        for path in _paths(function)
    }


def _of(node: ast.ClassDef, classes: Mapping[str, ast.ClassDef]) -> Iterator[Read]:
    for method in node.body:
        if isinstance(method, ast.FunctionDef) and not method.name.startswith(NOT_IN_FORWARD):
            for path in _paths(method):
                kind = _kind(node, path, classes)
                if kind is not None:
                    yield Read(node.name, path.removeprefix("self."), kind)


def _paths(method: ast.FunctionDef) -> Iterator[str]:
    """Yield what stands before ``.weight`` where its values are read."""
    parents = {child: parent for parent in ast.walk(method) for child in ast.iter_child_nodes(parent)}
    for node in ast.walk(method):
        if isinstance(node, ast.Call) and _name(node.func) == "getattr" and len(node.args) > 1:
            owner, name = node.args[:2]
            if isinstance(name, ast.Constant) and name.value == "weight":
                yield _path(owner)
        if not (isinstance(node, ast.Attribute) and node.attr == "weight" and isinstance(node.ctx, ast.Load)):
            continue
        parent = parents[node]
        asked = isinstance(parent, ast.Attribute) and parent.attr in FACTS
        asked |= isinstance(parent, ast.Call) and _name(parent.func) in ("isinstance", "hasattr")
        if not asked and _path(node.value) != "self":  # the module's own parameter
            yield _path(node.value)


def _path(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_path(node.value)}.{node.attr}"
    if isinstance(node, ast.Subscript):
        return f"{_path(node.value)}.*"
    return node.id if isinstance(node, ast.Name) else ast.unparse(node)


def _name(node: ast.expr) -> str:
    return _path(node).rpartition(".")[2]


def _kind(owner: ast.ClassDef, path: str, classes: Mapping[str, ast.ClassDef]) -> str | None:
    """Return of what kind the layer at ``self.a.b`` is; ``None`` for one that has no adapter, such as a norm."""
    first, *rest = path.split(".")
    if first != "self":
        return "unknown"
    made = [owner.name]
    for attribute in rest:
        if attribute != "*":  # a list is what is in it
            made = [one for name in made if name in classes for one in _made(classes[name], attribute, classes)]
    if not made:
        return "unknown"
    kinds = {_kind_of_class(name, classes) for name in made} - {None}
    return min(kinds) if kinds else None  # type: ignore[type-var]


def _made(owner: ast.ClassDef, attribute: str, classes: Mapping[str, ast.ClassDef]) -> list[str]:
    """Return the names of the classes, or functions, whose results a class or its bases put into an attribute."""
    values = [
        node.value
        for node in ast.walk(owner)
        if isinstance(node, ast.Assign) and any(_path(target) == f"self.{attribute}" for target in node.targets)
    ]
    made = [_name(node.func) for value in values for node in ast.walk(value) if isinstance(node, ast.Call)]
    if not made:
        bases = [classes[name] for name in map(_name, owner.bases) if name in classes and name != owner.name]
        return [one for base in bases for one in _made(base, attribute, classes)]
    return made


def _kind_of_class(name: str, classes: Mapping[str, ast.ClassDef]) -> str | None:
    if name in KINDS:
        return KINDS[name]
    bases = [] if name not in classes else [_name(base) for base in classes[name].bases]
    return next((kind for base in bases if base != name and (kind := _kind_of_class(base, classes))), None)
