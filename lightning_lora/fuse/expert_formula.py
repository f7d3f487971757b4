"""What a module of fused experts computes: ``sum_k w_k down_e(G(gate_up_e(x)))``, or something else.

transformers' decorator gives a class several implementations of experts, which are to compute one formula. The one that
a module is set to is run on small numbers, with small weights in the place of its own, and compared with the formula.
"""

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_lora.fuse.gated_mlp import SCALES
from lightning_lora.fuse.structure import facts
from lightning_lora.layers.parameters import LoRAParameters
from lightning_lora.ops.experts.gates import Gate, KnownGate, OwnGate
from lightning_lora.ops.gated_mlp import ACTIVATIONS

OWN = "own"  # a gate that is the module's own function
GROUPED = "grouped_mm"
_DISPATCHER = "transformers.integrations.moe"
_IMPLEMENTATIONS = ("eager", "batched_mm", GROUPED)
_TOKENS, _HIDDEN, _INTERMEDIATE = 5, 4, 8  # rows of whole 16 bytes, as grouped products want them


class Names(NamedTuple):
    """The names of the base's tensors; those of biases may be missing."""

    opening: str
    closing: str
    biases: tuple[str, ...]

    @property
    def all(self) -> tuple[str, ...]:
        return (self.opening, self.closing, *self.biases)


def names_of(module: LoRAParameters) -> Names | None:
    """Return which tensor of a module is which, by transformers' convention, if it has these tensors and no others."""
    base: Any = module.lora_base_class
    if getattr(base.forward, "__globals__", {}).get("__name__") != _DISPATCHER:
        return None
    opening = "gate_up_proj" if module.has_gate else "up_proj"
    names = Names(opening, "down_proj", (f"{opening}_bias", "down_proj_bias") if module.has_bias else ())
    found = [name for name in module._parameters if name not in module.tensor_names]
    adapts_matrices = module.lora_parts.keys() <= {names.opening, names.closing}
    return names if sorted(found) == sorted(names.all) and adapts_matrices else None


def implementation_of(module: nn.Module) -> str:
    """Return the name of the implementation that a module is set to."""
    return getattr(module.config, "_experts_implementation", None) or "eager"


def gate_function(module: Any) -> Any:
    """Return the module's own ``G``."""
    return module._apply_gate if module.has_gate else module.act_fn


def gate_of(module: LoRAParameters, names: Names, known: dict[Any, Any]) -> str | None:
    """Return the name of the activation in ``G = act(a) * b``, or :data:`OWN`; ``None`` where the formula is another.

    Args:
        known: what was found out about other modules of the same model.
    """
    implementation = implementation_of(module)
    small = _small(module, names)
    if small is None or implementation not in _IMPLEMENTATIONS:
        return None
    children = tuple((name, facts(child)) for name, child in module._modules.items())
    key = (facts(small), children, tuple(small._parameters), implementation)
    if key not in known:
        with torch.random.fork_rng(devices=[]):
            known[key] = _found(small, names)
    found: str | None = known[key]
    return found


def _found(small: Any, names: Names) -> str | None:
    own = OwnGate(gate_function(small))
    for name, gate in ({name: KnownGate(name) for name in ACTIVATIONS} if small.has_gate else {}).items():
        if _computes(small, names, gate):
            return name
    return OWN if _computes(small, names, own) else None


def _small(module: LoRAParameters, names: Names) -> Any:
    """Return a copy of a module with small weights; ``None`` if it holds more than can be copied."""
    if module._buffers or any(c is None or c._modules or c._parameters or c._buffers for c in module._modules.values()):
        return None
    small: Any = object.__new__(module.lora_base_class)
    own = {name: value for name, value in module.__dict__.items() if not name.startswith("lora_")}
    small.__dict__.update(own, _parameters={}, _modules={name: copy.copy(c) for name, c in module._modules.items()})
    small.__dict__.pop("adapter_names", None)
    small.train()  # what draws random numbers then, backward would not make again
    dtype = torch.float32 if implementation_of(module) == GROUPED else torch.float64
    generator = torch.Generator().manual_seed(0)
    closing = module._parameters[names.closing]
    assert closing is not None
    num_experts, opened = len(closing), (1 + module.has_gate) * _INTERMEDIATE
    sizes = {names.opening: (opened, _HIDDEN), names.closing: (_HIDDEN, _INTERMEDIATE)}
    for name in names.all:
        size = sizes.get(name) or sizes[name.removesuffix("_bias")][:1]
        size = size[::-1] if module.lora_transposed else size
        values = torch.randn(num_experts, *size, generator=generator, dtype=dtype, device="cpu")
        small._parameters[name] = nn.Parameter(values, requires_grad=False)
    return small


@torch.no_grad()
def _computes(small: Any, names: Names, gate: Gate) -> bool:
    generator = torch.Generator().manual_seed(1)
    weight = small._parameters[names.opening]
    num_experts, dtype = len(weight), weight.dtype
    x = torch.randn(_TOKENS, _HIDDEN, generator=generator, dtype=dtype, device="cpu")
    scores = torch.rand(_TOKENS, num_experts, generator=generator, dtype=dtype, device="cpu")
    weights, index = scores.topk(min(2, num_experts), dim=1)
    for scale in SCALES:
        try:
            expected = _formula(small, names, gate, x * scale, index, weights)
            given = type(small).forward(small, x * scale, index, weights)
        except Exception:  # a forward of any kind: what cannot be run so is left as it is
            return False
        if not isinstance(given, Tensor) or given.dtype != expected.dtype or given.shape != expected.shape:
            return False
        tolerance = 1e-5 if dtype == torch.float32 else 1e-12
        if not (given - expected).abs().max() <= tolerance * expected.abs().max():
            return False
    return True


def _formula(small: Any, names: Names, gate: Gate, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Return the formula's value; a gate that changes what it is given has none."""

    def product(rows: Tensor, name: str) -> Tensor:
        weight, bias = small._parameters[name][index], small._parameters.get(f"{name}_bias")
        weight = weight if small.is_transposed else weight.transpose(-2, -1)
        y = (rows.unsqueeze(-2) @ weight).squeeze(-2)  # [T, k, out]
        total: Tensor = y if bias is None else y + bias[index]
        return total

    e = product(x[:, None], names.opening).flatten(0, 1)
    given = e.clone()
    h = gate.forward(given).unflatten(0, index.shape)
    if not torch.equal(e, given):
        raise ValueError("the gate works in place")
    return (product(h, names.closing) * weights[..., None]).sum(1)
