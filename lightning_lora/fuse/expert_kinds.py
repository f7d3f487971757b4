"""Recognise modules of fused experts by their code: which tensor is which, and what lies between the products."""

import sys
from collections.abc import Collection
from typing import Any, NamedTuple

from torch import nn

from lightning_lora.compat.transformers import experts_gate, experts_have_gate, experts_implementation
from lightning_lora.fuse.expert_forms import LOOPS, OWN_ACTIVATIONS, OWN_GATES, default_gate
from lightning_lora.fuse.forms import activation_name
from lightning_lora.layers.same_code import same_code

OWN = "own"  # a gate that is the module's own function
GROUPED = "grouped_mm"
_DISPATCHER = "transformers.integrations.moe"
_FUNCTIONS = {GROUPED: "grouped_mm_experts_forward", "batched_mm": "batched_mm_experts_forward"}  # of that module


class Names(NamedTuple):
    """The names of the base's tensors; those of biases may be missing."""

    opening: str
    closing: str
    biases: tuple[str, ...]

    @property
    def matrices(self) -> tuple[str, str]:
        return self.opening, self.closing

    @property
    def all(self) -> tuple[str, ...]:
        return (self.opening, self.closing, *self.biases)


class Recognised(NamedTuple):
    """What is known of a module of experts.

    Attributes:
        gates: by implementation: an activation, :data:`OWN`, or ``None`` where the formula is another.
    """

    names: Names
    gates: dict[str, str | None]


def recognise(module: nn.Module, base: type, own: Collection[str]) -> Recognised | None:
    """Return what a module computes if it is a written form of experts.

    Args:
        base: the class that transformers or the user wrote.
        own: names of the parameters that the module has of this class.
    """
    names = _names_of(module, base, own)
    gate = None if names is None else gate_of(module, base)
    return None if names is None or gate is None else Recognised(names, {implementation_of(module): gate})


def _names_of(module: Any, base: Any, own: Collection[str]) -> Names | None:
    """Return which tensor of a module is which, by transformers' convention, if it has these tensors and no others."""
    transformers_moe = sys.modules.get(_DISPATCHER)
    if transformers_moe is None or getattr(base.forward, "__globals__", None) is not vars(transformers_moe):
        return None  # its class was not decorated with transformers' use_experts_implementation
    opening = "gate_up_proj" if experts_have_gate(module) else "up_proj"
    names = Names(opening, "down_proj", (f"{opening}_bias", "down_proj_bias") if module.has_bias else ())
    has_more = module.__dict__.get("has_post_expert_norm", False)
    return names if sorted(own) == sorted(names.all) and not has_more else None


def implementation_of(module: nn.Module) -> str:
    """Return the name of the implementation that a module is set to."""
    config: Any = module.config
    return experts_implementation(config)


def gate_of(module: Any, base: Any) -> str | None:
    """Return the activation in ``G = act(a) * b``, or :data:`OWN`; ``None`` where the code is not a written form's."""
    implementation = implementation_of(module)
    activation = getattr(module, "act_fn", None)
    known = None if activation is None else activation_name(activation)
    kind = f"{type(activation).__module__}.{type(activation).__qualname__}"
    is_pure = activation is None or known is not None or kind in OWN_ACTIVATIONS
    if not is_pure or not _computes_the_formula(base, implementation, module):
        return None
    if not experts_have_gate(module):
        return OWN
    if same_code(experts_gate(base), default_gate):
        return known or OWN
    return OWN if any(same_code(experts_gate(base), gate) for gate in OWN_GATES) else None


def _computes_the_formula(base: Any, implementation: str, module: Any) -> bool:
    """Return True if an implementation is transformers' own function, or a class's loop that is a written form."""
    if implementation in _FUNCTIONS:
        moe: Any = sys.modules[_DISPATCHER]
        return moe.ALL_EXPERTS_FUNCTIONS.get(implementation) is getattr(moe, _FUNCTIONS[implementation])
    loop = next((LOOPS[form] for form in LOOPS if same_code(getattr(base.forward, "__wrapped__", None), form)), None)
    if implementation != "eager" or loop is None:
        return False
    is_same_gate = loop.has_own_gate or same_code(experts_gate(base), default_gate)
    layout = bool(module.is_transposed), bool(module.has_bias)
    return experts_have_gate(module) and is_same_gate and layout == (loop.is_transposed, loop.has_bias)
