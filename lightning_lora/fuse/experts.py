"""Compute modules of fused experts in one function: :class:`LoRAExperts`, and :class:`QuantizedExperts`."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_lora.compat.torch import has_global_hooks, is_transformed
from lightning_lora.compat.transformers import experts_gate, experts_have_gate, is_expert_parallel
from lightning_lora.fuse.expert_kinds import GROUPED, OWN, Recognised, gate_of, implementation_of, recognise
from lightning_lora.fuse.gated_mlp import is_watched
from lightning_lora.layers.base import Pair
from lightning_lora.layers.class_swap import swap_class
from lightning_lora.layers.parameters import LoRAParameters
from lightning_lora.layers.quantized import QuantizedModule, quantize_parameters
from lightning_lora.ops.autocast import autocast_dtype
from lightning_lora.ops.experts.function import lora_experts
from lightning_lora.ops.experts.gates import Gate, KnownGate, OwnGate
from lightning_lora.ops.experts.records import ExpertWeights
from lightning_lora.ops.packed_stack import PackedStack
from lightning_lora.ops.sharded import is_dtensor


class FusedExperts(nn.Module):
    """Mixin of experts ``sum_k w_k down_e(G(gate_up_e(x)))``, whose forward and backward are one function.

    Fusing is skipped, and the base's own ``forward`` runs, on weights that keep the factors apart, where a hook sees a
    child, the base trains, weights are in shards, or torch traces or transforms the code.
    """

    record: ClassVar[str]  # the attribute that holds what is known of the experts
    written_class: ClassVar[str]  # the attribute that holds the class that transformers or the user wrote

    @property
    def recognised(self) -> Recognised:
        """What is known of the experts."""
        known: Recognised = self.__dict__[self.record]
        return known

    def fused(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """Return the output, computed in one function, or ``None`` where the base's own code has to run."""
        pairs = self.pairs() if isinstance(self, LoRAParameters) and self.lora_active else {}
        if not self._is_fused(args, kwargs, pairs):
            return None
        x, index, weights = args
        opening, closing = (self._stack(name, pairs.get(name)) for name in self.recognised.names.matrices)
        return lora_experts(x, index, weights, opening, closing, self._gate(), dtype=self._dtype(x))

    def _is_fused(self, args: tuple[Any, ...], kwargs: dict[str, Any], pairs: dict[str, Pair]) -> bool:
        if len(args) != 3 or kwargs or not all(_is_plain(one) for one in args):
            return False
        x, index, weights = args
        names = self.recognised.names
        base = [tensor for name in names.all for tensor in self._tensors(name)]
        own: list[Any] = [*base, *(factor for pair in pairs.values() for factor in (pair.A, pair.B))]
        return (
            x.device.type in ("cpu", "cuda")
            and (x.ndim, index.ndim, index.shape) == (2, 2, weights.shape)
            and all(_is_plain(one) and one.device == x.device for one in own)
            and not (torch.is_grad_enabled() and any(one is not None and one.requires_grad for one in base))
            and pairs.keys() <= set(names.matrices)
            and self._is_of_one_dtype(x)
            and not is_expert_parallel(self)
            and not (is_transformed() or has_global_hooks())
            and not any(is_watched(child) for child in self._modules.values())
            and self._known_gate() is not None
        )

    def _is_of_one_dtype(self, x: Tensor) -> bool:
        opening, closing = map(self._dtype_of, self.recognised.names.matrices)
        is_cast = isinstance(self, QuantizedModule) or opening == x.dtype or self._dtype(x) != x.dtype
        return opening == closing and is_cast

    def _dtype(self, x: Tensor) -> torch.dtype:
        """Return what the products run in; autocast casts for none that are grouped, those take the weight's dtype.

        Packed matrices are made dense in the dtype of x, which FSDP2 casts with what it gathers, and not bytes.
        """
        is_packed = isinstance(self, QuantizedModule)
        if implementation_of(self) == GROUPED and not (is_packed and autocast_dtype(x) is None):
            return self._dtype_of(self.recognised.names.opening)
        return x.dtype if x.dtype == torch.float64 else autocast_dtype(x) or x.dtype

    def _known_gate(self) -> str | None:
        implementation, gates = implementation_of(self), self.recognised.gates
        if implementation not in gates:  # the model was set to another one since
            if torch.compiler.is_compiling():
                return None
            gates[implementation] = gate_of(self, getattr(self, self.written_class))
        return gates[implementation]

    def _gate(self) -> Gate:
        known = self._known_gate()
        assert known is not None
        if known != OWN:
            return KnownGate(known)
        module: Any = self
        return OwnGate(experts_gate(module) if experts_have_gate(module) else module.act_fn)

    def _tensors(self, name: str) -> list[Tensor | None]:
        """Return the tensors that a base's one is made of: past ``__getattr__``, which gives the one with an update."""
        if isinstance(self, QuantizedModule) and name in self.quantized:
            return list(self.stored(name).tensors.values())
        return [self._parameters.get(name)]

    def _dtype_of(self, name: str) -> torch.dtype:
        if isinstance(self, QuantizedModule) and name in self.quantized:
            return self.quantized[name].dtype
        [tensor] = self._tensors(name)
        assert tensor is not None
        return tensor.dtype

    def _stack(self, name: str, pair: Pair | None) -> ExpertWeights:
        weight: Any = self._parameters.get(name)
        if isinstance(self, QuantizedModule) and name in self.quantized:
            weight = PackedStack(self.stored(name))
        weight = weight.mT if getattr(self, "is_transposed", False) else weight
        factors = (None, None, 1.0) if pair is None else (pair.A, pair.B, pair.scaling)
        return ExpertWeights(weight, self._parameters.get(f"{name}_bias"), *factors)


class LoRAExperts(FusedExperts, LoRAParameters):
    """Mixin of adapted experts over plain weights."""

    record = "lora_experts"
    written_class = "lora_base_class"

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        y = self.fused(args, kwargs) if self.lora_active else None
        return super().forward(*args, **kwargs) if y is None else y


class QuantizedExperts(FusedExperts, QuantizedModule):
    """Mixin of experts with packed matrices, adapted or not: one at a time is made dense, and again in backward."""

    record = "quantized_experts"
    written_class = "quantized_base_class"
    form_attributes = (*QuantizedModule.form_attributes, "quantized_experts")

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        y = self.fused(args, kwargs)
        return super().forward(*args, **kwargs) if y is None else y


def _is_plain(tensor: Any) -> bool:
    """Whether a tensor is no subclass that has a way of its own to multiply, other than a tracer's stand-in."""
    return type(tensor) in (Tensor, nn.Parameter) or (torch.compiler.is_compiling() and not is_dtensor(tensor))


def fuse_experts(module: nn.Module) -> None:
    """Give adapted experts that are recognised the class that computes them together."""
    if not isinstance(module, LoRAParameters) or isinstance(module, FusedExperts):
        return
    base = module.base_layer
    own = [name for name in base._parameters if name not in module.tensor_names]
    known = recognise(base, module.lora_base_class, own)
    if known is not None and module.lora_parts.keys() <= set(known.names.matrices):
        swap_class(module, LoRAExperts, module.lora_base_class)
        module.__dict__["lora_experts"] = known


def quantize_experts(module: nn.Module, known: Recognised, kind: str) -> None:
    """Pack the matrices of experts in place, each by itself."""
    quantize_parameters(module, dict.fromkeys(known.names.matrices, kind), QuantizedExperts)
    module.__dict__["quantized_experts"] = known
