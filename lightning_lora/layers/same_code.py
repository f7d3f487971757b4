"""Recognise by bytecode a forward that is a copy of a known one, and linear layers that compute ``x W^T + b``."""

import builtins
import dis
import functools
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

CONV1D = "transformers.pytorch_utils.Conv1D"


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


def is_plain_linear(cls: type[nn.Module]) -> bool:
    """Return True if the forward of a class is ``x W^T + b``, so that an adapter can be merged into its weight.

    It is torch's own, or one of the written forms by its code.
    """
    for base in cls.__mro__:
        forward: Any = vars(base).get("forward")
        if forward is nn.Linear.forward or any(same_code(forward, form.forward) for form in _FORMS):
            return True
        calls_next = same_code(forward, _Inherited.forward) and forward.__closure__[0].cell_contents is base
        if forward is not None and not calls_next:
            return False
    return False


class _Plain:
    def forward(self: Any, x: Any) -> Any:
        return F.linear(x, self.weight, self.bias)


class _Inherited(nn.Linear):
    def forward(self, x: Any) -> Any:
        return super().forward(x)


class _Falcon:
    def forward(self: Any, x: Any) -> Any:
        hidden_states = x @ self.weight.T
        if self.bias is None:
            return hidden_states
        return hidden_states + self.bias


class _Idefics:
    def forward(self: Any, x: Any) -> Any:
        output = F.linear(x, self.weight, self.bias)

        if self.out_additional_features > 0:
            additional_features = self.additional_fc(x)
            output = torch.cat((output, additional_features), -1)

        return output


_FORMS: tuple[Any, ...] = (_Plain, _Falcon, _Idefics)
