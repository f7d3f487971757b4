"""Compute modules of fused experts in one function, adapters included: :class:`LoRAExperts`."""

import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_lora.compat.torch import has_global_hooks, is_transformed
from lightning_lora.compat.transformers import (
    experts_gate,
    experts_have_gate,
    experts_implementation,
    is_expert_parallel,
)
from lightning_lora.fuse.expert_forms import LOOPS, OWN_ACTIVATIONS, OWN_GATES, default_gate
from lightning_lora.fuse.forms import activation_name
from lightning_lora.fuse.gated_mlp import is_watched
from lightning_lora.layers.class_swap import swap_class
from lightning_lora.layers.parameters import LoRAParameters
from lightning_lora.layers.same_code import same_code
from lightning_lora.ops.autocast import autocast_dtype
from lightning_lora.ops.experts.function import lora_experts
from lightning_lora.ops.experts.gates import Gate, KnownGate, OwnGate
from lightning_lora.ops.experts.records import ExpertWeights
from lightning_lora.ops.sharded import is_dtensor

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
    def all(self) -> tuple[str, ...]:
        return (self.opening, self.closing, *self.biases)


class LoRAExperts(LoRAParameters):
    """Mixin of experts ``sum_k w_k down_e(G(gate_up_e(x)))``, whose forward and backward are one function.

    Fusing is skipped, and the base's own ``forward`` runs, on weights that keep the factors apart, where a hook sees a
    child, the base trains, weights are in shards, or torch traces or transforms the code.
    """

    lora_names: Names
    lora_gates: dict[str, str | None]  # by implementation: an activation, OWN, or None where the formula is another

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self._is_fused(args, kwargs):
            return super().forward(*args, **kwargs)
        x, index, weights = args
        opening, closing = self._stack(self.lora_names.opening), self._stack(self.lora_names.closing)
        return lora_experts(x, index, weights, opening, closing, self._gate(), dtype=self._dtype(x))

    def _is_fused(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        if len(args) != 3 or kwargs or not self.lora_active or not all(_is_plain(one) for one in args):
            return False
        x, index, weights = args
        base = [self._parameters.get(name) for name in self.lora_names.all]
        own: list[Any] = [*base, *(self._parameters.get(name) for name in self.adapter_names)]
        return (
            x.device.type in ("cpu", "cuda")
            and (x.ndim, index.ndim, index.shape) == (2, 2, weights.shape)
            and all(_is_plain(one) and one.device == x.device for one in own)
            and not (torch.is_grad_enabled() and any(one is not None and one.requires_grad for one in base))
            and self._is_of_one_dtype(x)
            and not is_expert_parallel(self)
            and not (is_transformed() or has_global_hooks())
            and not any(is_watched(child) for child in self._modules.values())
            and self._known_gate() is not None
        )

    def _is_of_one_dtype(self, x: Tensor) -> bool:
        opening, closing = (self._base(name).dtype for name in self.lora_names[:2])
        return opening == closing and (opening == x.dtype or self._dtype(x) != x.dtype)

    def _dtype(self, x: Tensor) -> torch.dtype:
        """Return what the products run in; autocast casts for none that are grouped, those take the weight's dtype."""
        if implementation_of(self) == GROUPED:
            return self._base(self.lora_names.opening).dtype
        return x.dtype if x.dtype == torch.float64 else autocast_dtype(x) or x.dtype

    def _known_gate(self) -> str | None:
        implementation = implementation_of(self)
        if implementation not in self.lora_gates:  # the model was set to another one since
            if torch.compiler.is_compiling():
                return None
            self.lora_gates[implementation] = gate_of(self)
        return self.lora_gates[implementation]

    def _gate(self) -> Gate:
        known = self._known_gate()
        assert known is not None
        if known != OWN:
            return KnownGate(known)
        module: Any = self
        return OwnGate(experts_gate(module) if experts_have_gate(module) else module.act_fn)

    def _base(self, name: str) -> Tensor:
        weight = self._parameters[name]  # past __getattr__, which gives the one with the update
        assert weight is not None
        return weight

    def _stack(self, name: str) -> ExpertWeights:
        weight, bias, pair = self._base(name), self._parameters.get(f"{name}_bias"), self.pairs().get(name)
        weight = weight.mT if self.lora_transposed else weight
        return ExpertWeights(weight, bias, *((None, None, 1.0) if pair is None else (pair.A, pair.B, pair.scaling)))


def _is_plain(tensor: Any) -> bool:
    """Whether a tensor is no subclass that has a way of its own to multiply, other than a tracer's stand-in."""
    return type(tensor) in (Tensor, nn.Parameter) or (torch.compiler.is_compiling() and not is_dtensor(tensor))


def fuse_experts(module: nn.Module) -> None:
    """Give adapted experts that are recognised the class that computes them together."""
    if not isinstance(module, LoRAParameters) or isinstance(module, LoRAExperts):
        return
    names = _names_of(module)
    gate = None if names is None else gate_of(module)
    if gate is not None:
        swap_class(module, LoRAExperts, module.lora_base_class)
        module.__dict__.update(lora_names=names, lora_gates={implementation_of(module): gate})


def _names_of(module: LoRAParameters) -> Names | None:
    """Return which tensor of a module is which, by transformers' convention, if it has these tensors and no others."""
    base: Any = module.lora_base_class
    transformers_moe = sys.modules.get(_DISPATCHER)
    if transformers_moe is None or getattr(base.forward, "__globals__", None) is not vars(transformers_moe):
        return None  # its class was not decorated with transformers' use_experts_implementation
    opening = "gate_up_proj" if experts_have_gate(module) else "up_proj"
    names = Names(opening, "down_proj", (f"{opening}_bias", "down_proj_bias") if module.has_bias else ())
    found = [name for name in module._parameters if name not in module.tensor_names]
    adapts_matrices = module.lora_parts.keys() <= {names.opening, names.closing}
    has_more = module.__dict__.get("has_post_expert_norm", False)
    return names if sorted(found) == sorted(names.all) and adapts_matrices and not has_more else None


def implementation_of(module: nn.Module) -> str:
    """Return the name of the implementation that a module is set to."""
    config: Any = module.config
    return experts_implementation(config)


def gate_of(module: Any) -> str | None:
    """Return the activation in ``G = act(a) * b``, or :data:`OWN`; ``None`` where the code is not a written form's."""
    base, implementation = module.lora_base_class, implementation_of(module)
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
