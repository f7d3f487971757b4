"""What the code of a module's ``forward`` says: which of its layers it calls with one and the same tensor."""

import ast
import functools
import inspect
import textwrap
from collections import Counter, defaultdict
from collections.abc import MutableMapping, MutableSequence, MutableSet
from typing import Any, NamedTuple

from torch import nn
from typing_extensions import override


@functools.cache
def called_alike(cls: Any) -> tuple[tuple[str, ...], ...]:
    """Return the groups of children that ``cls.forward`` calls with the same variable, each once: ``self.q(x)``.

    ``cls`` is a class of modules. The calls of a group stand in one branch of the code, and nothing binds the variable
    anew between them. Where the source cannot be read there is no group.
    """
    tree = _source(cls)
    if tree is None or not tree.args.args:
        return ()
    reader = _Reader(tree.args.args[0].arg)
    for statement in tree.body:
        reader.visit(statement)
    times = Counter(call.child for call in reader.calls)
    groups: dict[tuple[str, tuple[int, ...], int], list[str]] = defaultdict(list)
    for call in reader.calls:
        if times[call.child] == 1 and call.child not in reader.otherwise:
            groups[call.variable, call.branch, call.binding].append(call.child)
    return tuple(tuple(children) for children in groups.values() if len(children) > 1)


def facts(module: nn.Module | None) -> tuple[Any, ...]:
    """Return what a module's own attributes are, parameters and children left out: equal for those of equal blocks.

    Numbers and words count by value, anything else by identity, so that it must not outlive the objects.
    """
    own = {} if module is None else own_attributes(module)
    return type(module), *(
        (name, value if isinstance(value, _PRIMITIVES) else id(value)) for name, value in own.items()
    )


def own_attributes(module: nn.Module) -> dict[str, Any]:
    """Return a module's plain attributes but those of ``nn.Module`` and of this package."""
    return {name: value for name, value in module.__dict__.items() if not name.startswith(_NOT_OWN)}


class Snapshot(NamedTuple):
    """A module's own attributes as they were."""

    attributes: dict[str, Any]
    names: frozenset[str]  # of these and of all others

    @classmethod
    def of(cls, module: nn.Module) -> "Snapshot":
        return cls(own_attributes(module), frozenset(module.__dict__))

    def is_of(self, module: nn.Module) -> bool:
        """Whether no own attribute of a module was changed, added or taken away: numbers and words by value."""
        now = module.__dict__
        if now.keys() != self.names:  # an attribute came or went, whosever it is
            now = own_attributes(module)
            if now.keys() != self.attributes.keys():
                return False
        for name, former in self.attributes.items():
            value = now[name]
            if value is not former and not (isinstance(value, _PRIMITIVES) and value == former):
                return False
        return True


def keeps_books(module: nn.Module) -> bool:
    """Whether a module has a list, a dictionary or a set, in which its ``forward`` may note what nobody else sees."""
    return any(
        isinstance(value, (MutableSequence, MutableMapping, MutableSet)) for value in own_attributes(module).values()
    )


_PRIMITIVES = (bool, int, float, str, type(None))
_NOT_OWN = ("_", "training", "lora_")


def _source(cls: Any) -> ast.FunctionDef | None:
    try:
        text = textwrap.dedent(inspect.getsource(inspect.unwrap(cls.forward)))
        (node,) = ast.parse(text).body
    except (OSError, TypeError, SyntaxError, ValueError):  # built-in, made at run time, or a lambda in an expression
        return None
    return node if isinstance(node, ast.FunctionDef) else None


class _Call(NamedTuple):
    child: str
    variable: str
    branch: tuple[int, ...]  # of the statements around it that may or may not run
    binding: int  # how often the variable was bound before


class _Reader(ast.NodeVisitor):
    """Collects the calls ``self.child(variable)`` in the order in which they run."""

    def __init__(self, self_name: str) -> None:
        self.self_name = self_name
        self.calls: list[_Call] = []
        self.otherwise: set[str] = set()  # children that are called in another way too
        self.branch: tuple[int, ...] = ()
        self.bound: Counter[str] = Counter()
        self.num_branches = 0

    @override
    def visit_Call(self, node: ast.Call) -> None:
        for part in (*node.args, *node.keywords):
            self.visit(part)
        child = self._child(node.func)
        if child is None:
            self.visit(node.func)
        elif len(node.args) == 1 and not node.keywords and isinstance(node.args[0], ast.Name):
            variable = node.args[0].id
            self.calls.append(_Call(child, variable, self.branch, self.bound[variable]))
        else:
            self.otherwise.add(child)

    def _child(self, node: ast.expr) -> str | None:
        is_own = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
        return node.attr if is_own and node.value.id == self.self_name else None  # type: ignore[attr-defined]

    @override
    def visit_Name(self, node: ast.Name) -> None:
        if not isinstance(node.ctx, ast.Load):
            self.bound[node.id] += 1

    @override
    def visit_Assign(self, node: ast.Assign) -> None:
        self.visit(node.value)  # runs before its targets are bound
        for target in node.targets:
            self.visit(target)

    @override
    def visit_NamedExpr(self, node: ast.NamedExpr) -> None:
        self.visit(node.value)
        self.visit(node.target)

    @override
    def generic_visit(self, node: ast.AST) -> None:
        if not isinstance(node, _MAY_RUN):
            super().generic_visit(node)
            return
        former = self.branch
        for _, value in ast.iter_fields(node):  # a body, its else, a condition
            self.num_branches += 1
            self.branch = (*former, self.num_branches)
            for part in value if isinstance(value, list) else [value]:
                if isinstance(part, ast.AST):
                    self.visit(part)
        self.branch = former


# whatever of these runs or does not run, or in another way, the calls before and after it are no sign
_MAY_RUN = (
    ast.If, ast.IfExp, ast.For, ast.While, ast.Try, ast.ExceptHandler, ast.BoolOp, ast.Lambda, ast.FunctionDef,
    ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp, ast.Match, ast.match_case, ast.With,
)  # fmt: skip
