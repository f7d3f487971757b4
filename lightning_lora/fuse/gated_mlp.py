"""Gated MLPs, ``down(act(gate(x)) * up(x))``, whose three adapted layers are computed as one.

A module is recognised by what it computes, not by its name: its ``forward`` is run on small numbers, with small layers
in the place of its own, and compared with the formula.
"""

import copy
from collections.abc import Container, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from typing_extensions import override

from lightning_lora.fuse.siblings import can_fuse, enter, factors, go_together, leave, term
from lightning_lora.fuse.structure import Snapshot, facts, keeps_books
from lightning_lora.layers.base import Made, lora_class
from lightning_lora.layers.linear import LoRALinear
from lightning_lora.layers.split import SplitLinear
from lightning_lora.ops.gated_mlp import ACTIVATIONS, lora_gated_mlp

# from where activations are linear to where limits that some models put on them are passed
SCALES = (0.03, 1.0, 30.0, 1e4)


class Roles(NamedTuple):
    """The names of a gated MLP's layers, and of the activation in :data:`~lightning_lora.ops.gated_mlp.ACTIVATIONS`."""

    gate: str
    up: str
    down: str
    activation: str


class Recognized(NamedTuple):
    """A module as it was, and its children but for some layers, with their classes."""

    own: Snapshot
    children: dict[str, tuple[type, Snapshot]]

    @classmethod
    def of(cls, module: nn.Module, layers: Container[str]) -> "Recognized":
        others = _others(module, layers)
        return cls(Snapshot.of(module), {name: (type(child), Snapshot.of(child)) for name, child in others})

    def is_of(self, module: nn.Module, layers: Container[str]) -> bool:
        """Whether a module has the attributes that it had, and so each child."""
        others = _others(module, layers)
        if len(others) != len(self.children) or not self.own.is_of(module):
            return False
        for name, child in others:
            former = self.children.get(name)
            if former is None or type(child) is not former[0] or not former[1].is_of(child):
                return False
        return True


def _others(module: nn.Module, layers: Container[str]) -> list[tuple[str, nn.Module]]:
    return [(name, child) for name, child in module._modules.items() if child is not None and name not in layers]


class LoRAGatedMLP(Made):
    """Mixin of a gated MLP with three adapted layers.

    It runs the base's own ``forward`` when a hook is to see a layer's input or output, when an adapter is merged,
    disabled or of another kind, when weights lie in shards, and when the module was changed since it was recognised.
    """

    lora_roles: Roles
    lora_recognized: Recognized

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs and self._is_fused(args[0]):
            return self._fused(args[0])
        return super().forward(*args, **kwargs)

    def _is_fused(self, x: Any) -> bool:
        gate, up, down = self._layers()
        return (
            isinstance(x, Tensor)
            and (can_fuse(gate, x) and can_fuse(up, x) and can_fuse(down, x))  # first: merged ones are to cost nothing
            and self._is_as_recognized()
            and not _has_any_global_hook()
            and not any(is_watched(child) for child in self._modules.values())
            and go_together([gate, up], gate)
            and _is_split_inside(gate, up, down)
        )

    def _is_as_recognized(self) -> bool:
        if torch.compiler.is_compiling():  # guards on every attribute would compile equal blocks one by one
            return True
        return self.lora_base_class.forward is type(self).lora_base_forward and self.lora_recognized.is_of(
            self, self.lora_roles[:3]
        )

    def _fused(self, x: Tensor) -> Tensor:
        gate, up, down = self._layers()
        y = lora_gated_mlp(
            enter(gate, x),
            factors(gate),
            factors(up),
            factors(down),
            activation=self.lora_roles.activation,
            entering=term(gate),
            leaving=term(down),
        )
        return leave(down, y)

    def _layers(self) -> tuple[Any, Any, Any]:
        children, roles = self._modules, self.lora_roles
        return children.get(roles.gate), children.get(roles.up), children.get(roles.down)


def _is_split_inside(gate: Any, up: Any, down: Any) -> bool:
    """Whether the layers are whole, or split so that what lies between them is this rank's part of it."""
    if not any(isinstance(layer, SplitLinear) for layer in (gate, up, down)):
        return True
    if not all(isinstance(layer, SplitLinear) for layer in (gate, up, down)):
        return False
    columns = gate.tp_dim == up.tp_dim == 0 and not (gate.tp_whole_output or up.tp_whole_output)
    return bool(columns and down.tp_dim == 1 and not down.tp_whole_input)


def is_watched(module: nn.Module | None) -> bool:
    """Whether a hook of a module is to see its input or output."""
    return module is not None and bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def fuse_gated_mlp(module: nn.Module, known: dict[Any, Any]) -> None:
    """Give a gated MLP whose three layers are adapted the class that computes them as one.

    Args:
        known: what was found out about other modules of the same model.
    """
    layers = {name: child for name, child in module._modules.items() if isinstance(child, LoRALinear)}
    if len(layers) != 3 or isinstance(module, LoRAGatedMLP):
        return
    key = _key(module, layers)
    if key not in known:
        known[key] = roles_of(module)
    if known[key] is not None:
        module.__class__ = lora_class(LoRAGatedMLP, type(module))
        module.__dict__.update(lora_roles=known[key], lora_recognized=None)
        module.__dict__.update(lora_recognized=Recognized.of(module, layers))


def release_gated_mlp(module: LoRAGatedMLP) -> None:
    """Give the module its base class back."""
    del module.__dict__["lora_roles"], module.__dict__["lora_recognized"]
    module.__class__ = module.lora_base_class  # type: ignore[assignment]  # the reverse of the class swap


def _key(module: nn.Module, layers: dict[str, LoRALinear]) -> tuple[Any, ...]:
    """Return what the formula of a module can depend on; equal for the MLPs of equal blocks."""
    others = tuple((name, facts(child)) for name, child in module._modules.items() if name not in layers)
    sizes = tuple((name, layer.lora_base_class, layer.bias is None, *_sides(layer)) for name, layer in layers.items())
    return facts(module), sizes, others


def _sides(layer: LoRALinear) -> tuple[int, int]:
    return layer.lora_A.shape[1], layer.lora_B.shape[0]


def roles_of(module: nn.Module) -> Roles | None:
    """Return which layer of a module is which, if it computes ``down(act(gate(x)) * up(x))`` and nothing else."""
    layers = {name: child for name, child in module._modules.items() if isinstance(child, LoRALinear)}
    for gate, up, down in _orders(layers):
        small = _small(module, layers, down)
        if small is None:
            return None
        for activation in ACTIVATIONS:
            if _computes(small, Roles(gate, up, down, activation)):
                return Roles(gate, up, down, activation)
    return None


def _orders(layers: dict[str, LoRALinear]) -> Iterator[tuple[str, str, str]]:
    for down in layers:
        gate, up = (name for name in layers if name != down)
        if _sides(layers[gate]) == _sides(layers[up]) and _sides(layers[gate])[1] == _sides(layers[down])[0]:
            yield gate, up, down
            yield up, gate, down


_HIDDEN, _INTERMEDIATE = 4, 6


class _SmallLinear(nn.Module):
    """A linear layer of random numbers, in float64; no random state is touched to make it."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, in_features: int, out_features: int, *, bias: bool, seed: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        generator = torch.Generator().manual_seed(seed)
        values = torch.randn(out_features, in_features + 1, generator=generator, dtype=torch.float64, device="cpu")
        self.weight, self.bias = values[:, :-1], values[:, -1] if bias else None

    @override
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


def _small(module: nn.Module, layers: dict[str, LoRALinear], down: str) -> nn.Module | None:
    """Return a copy of a module with small layers; ``None`` if it holds more than can be copied."""
    if any(keeps_books(one) for one in (module, *module._modules.values()) if one is not None):
        return None
    small: Any = object.__new__(type(module))
    small.__dict__.update(module.__dict__, _modules={})
    for seed, (name, child) in enumerate(module._modules.items()):
        if name in layers:
            sides = (_INTERMEDIATE, _HIDDEN) if name == down else (_HIDDEN, _INTERMEDIATE)
            small._modules[name] = _SmallLinear(*sides, bias=layers[name].bias is not None, seed=seed)
        elif child is None or child._modules or child._parameters or child._buffers:
            return None
        else:  # an activation, a dropout
            small._modules[name] = copy.copy(child)
    return small if not (module._parameters or module._buffers) else None


@torch.no_grad()
def _computes(small: Any, roles: Roles) -> bool:
    """Whether a module computes the formula, in training and evaluation, and changes nothing of its own."""
    former = Recognized.of(small, roles[:3])
    for training in (True, False):
        for one in (small, *small._modules.values()):
            one.training = training
        if not _gives(small, roles):
            return False
    return former.is_of(small, roles[:3])


def _gives(small: Any, roles: Roles) -> bool:
    gate, up, down = (small._modules[name] for name in roles[:3])
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, _HIDDEN, generator=generator, dtype=torch.float64, device="cpu")
    with torch.random.fork_rng(devices=[]):
        for scale in SCALES:
            expected = down(ACTIVATIONS[roles.activation].forward(gate(x * scale)) * up(x * scale))
            try:
                given = type(small).forward(small, x * scale)
            except Exception:  # a forward of any kind: what cannot be run so is left as it is
                return False
            if not isinstance(given, Tensor) or given.dtype != expected.dtype or given.shape != expected.shape:
                return False
            if not torch.allclose(given, expected, rtol=1e-12, atol=0.0):
                return False
    return True
