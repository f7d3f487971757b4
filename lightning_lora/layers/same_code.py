"""Compare two functions by bytecode, to recognise a forward that is a copy of a known one."""

import builtins
import dis
import functools
from types import FunctionType
from typing import Any


@functools.cache
def same_code(function: Any, form: FunctionType) -> bool:
    """Return True if a plain function does what ``form`` does, instruction by instruction.

    Names of parameters and variables, annotations and docstrings may differ. Defaults, constants, attributes and the
    objects that global names stand for are the same. Neither function closes over variables, other than ``super()``'s.
    """
    return (
        isinstance(function, FunctionType)
        and set(function.__code__.co_freevars) <= {"__class__"}
        and _signature(function) == _signature(form)
        and _instructions(function) == _instructions(form)
    )


def _signature(function: FunctionType) -> tuple[Any, ...]:
    code = function.__code__
    kinds = code.co_flags & (0x04 | 0x08)  # *args, **kwargs
    exceptions = getattr(code, "co_exceptiontable", b"")
    return code.co_argcount, code.co_kwonlyargcount, kinds, function.__defaults__, function.__kwdefaults__, exceptions


def _instructions(function: FunctionType) -> list[tuple[str, Any]]:
    def meaning(one: dis.Instruction) -> Any:
        if one.opname == "LOAD_GLOBAL":  # by identity, so that `torch` is torch
            return id(function.__globals__.get(one.argval, getattr(builtins, one.argval, one)))
        if one.opcode in dis.haslocal:
            return one.arg
        return repr(one.argval)  # 1 is not 1.0

    return [(one.opname, meaning(one)) for one in dis.get_instructions(function)]
