"""Modules of fused experts that are computed as one, adapters included: :class:`LoRAExperts`."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from typing_extensions import override

from lightning_lora.fuse.expert_formula import GROUPED, OWN, Names, gate_function, gate_of, implementation_of, names_of
from lightning_lora.fuse.gated_mlp import is_watched
from lightning_lora.layers.base import lora_class
from lightning_lora.layers.parameters import LoRAParameters
from lightning_lora.ops.experts.function import lora_experts
from lightning_lora.ops.experts.gates import Gate, KnownGate, OwnGate
from lightning_lora.ops.experts.stacks import Stack
from lightning_lora.ops.linear import autocast_dtype, is_transformed
from lightning_lora.ops.sharded import is_dtensor


class LoRAExperts(LoRAParameters):
    """Mixin of experts ``sum_k w_k down_e(G(gate_up_e(x)))``, whose forward and backward are one function.

    The base's own ``forward`` runs, on weights that keep the factors apart, while a hook is to see a child, the base
    trains, weights are in shards, and where torch traces or transforms the code.
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
            and not self.__dict__.get("_is_expert_parallel", False)
            and not (is_transformed() or _has_any_global_hook())
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
            self.lora_gates[implementation] = gate_of(self, self.lora_names, {})
        return self.lora_gates[implementation]

    def _gate(self) -> Gate:
        known = self._known_gate()
        assert known is not None
        return OwnGate(gate_function(self)) if known == OWN else KnownGate(known)

    def _base(self, name: str) -> Tensor:
        weight = self._parameters[name]  # past __getattr__, which gives the one with the update
        assert weight is not None
        return weight

    def _stack(self, name: str) -> Stack:
        weight, bias, pair = self._base(name), self._parameters.get(f"{name}_bias"), self.pairs().get(name)
        weight = weight.mT if self.lora_transposed else weight
        return Stack(weight, bias, *((None, None, 1.0) if pair is None else (pair.A, pair.B, pair.scaling)))


def _is_plain(tensor: Any) -> bool:
    """Whether a tensor is no subclass that has a way of its own to multiply, other than a tracer's stand-in."""
    return type(tensor) in (Tensor, nn.Parameter) or (torch.compiler.is_compiling() and not is_dtensor(tensor))


def fuse_experts(module: nn.Module, known: dict[Any, Any]) -> None:
    """Give adapted experts that are recognised the class that computes them as one.

    Args:
        known: what was found out about other modules of the same model.
    """
    if not isinstance(module, LoRAParameters) or isinstance(module, LoRAExperts):
        return
    names = names_of(module)
    gate = None if names is None else gate_of(module, names, known)
    if gate is not None:
        module.__class__ = lora_class(LoRAExperts, module.lora_base_class)
        module.__dict__.update(lora_names=names, lora_gates={implementation_of(module): gate})
