"""Gated MLPs, ``down(act(gate(x)) * up(x))``, whose three adapted layers are computed by one function."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_lora.compat.torch import has_global_hooks, has_hooks
from lightning_lora.fuse.forms import GATED_FORMS, GatedForm, activation_name, form_of
from lightning_lora.fuse.linears import can_fuse, factors, go_together
from lightning_lora.fuse.mixed import fit_together
from lightning_lora.layers.acting import Mixture
from lightning_lora.layers.class_swap import SwappedModule, swap_class
from lightning_lora.layers.linear import LoRALinear
from lightning_lora.layers.linear_host import LinearHost, mixed_linears
from lightning_lora.layers.split import SplitLinear, enter, leave
from lightning_lora.ops.gated_mlp import ACTIVATIONS, lora_gated_mlp

_registered: dict[Any, GatedForm] = {}  # by forward


def register_gated_mlp(cls: type[nn.Module], *, gate: str, up: str, down: str, activation: str = "silu") -> None:
    """Declare that ``cls`` computes ``down(activation(gate(x)) * up(x))``, so that ``inject`` fuses its three layers.

    The declaration holds for ``cls.forward``, in subclasses as well, and for models that are adapted after it. The
    forward is then replaced while all three layers are adapted: it has no other effects.

    Example::

        register_gated_mlp(MyMLP, gate="w1", up="w3", down="w2")

    Args:
        cls: a class of modules whose ``forward`` takes one tensor.
        gate: the name of the layer, an attribute of the module, whose output is activated; ``up``, ``down`` likewise.
        activation: ``"silu"``, ``"gelu"``, ``"gelu_tanh"`` or ``"relu"``.

    Raises:
        TypeError: ``cls`` is no class of modules.
        ValueError: the activation is another one.
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise TypeError(f"register_gated_mlp takes a subclass of torch.nn.Module, got {cls!r}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r} is unknown; it is one of {', '.join(map(repr, ACTIVATIONS))}")
    _registered[cls.forward] = GatedForm(gate, up, down, activation)


class LoRAGatedMLP(SwappedModule):
    """Mixin of a gated MLP with three adapted layers.

    Fusing is skipped, and the base's own ``forward`` runs, where it would be visible: with hooks on the children, with
    adapters that are merged, disabled or of another kind, with weights in shards, and once the forward, the activation
    or an attribute that changes the formula was replaced.
    """

    lora_form: GatedForm
    lora_activation: str

    go_together: Callable[..., bool] = staticmethod(go_together)

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs and isinstance(args[0], Tensor) and self._is_fused(args[0]):
            return self._fused(args[0])
        return super().forward(*args, **kwargs)

    def _is_fused(self, x: Tensor) -> bool:
        gate, up, down = self._layers()
        return (
            (can_fuse(gate, x) and can_fuse(up, x) and can_fuse(down, x))  # first: merged ones are to cost nothing
            and self._has_its_formula()
            and not has_global_hooks()
            and not any(is_watched(child) for child in self._modules.values())
            and self.go_together([gate, up], gate)
            and _is_split_inside(gate, up, down)
        )

    def _has_its_formula(self) -> bool:
        if not self.lora_form.condition(self):
            return False
        if torch.compiler.is_compiling():  # guards on classes and functions would compile equal blocks one by one
            return True
        is_same_forward = self.lora_base_class.forward is type(self).lora_base_forward
        return is_same_forward and _activation_of(self, self.lora_form) == self.lora_activation

    def _fused(self, x: Tensor) -> Tensor:
        gate, up, down = self._layers()
        y = lora_gated_mlp(
            enter(gate, x),
            factors(gate, x),
            factors(up, x),
            factors(down, x),
            activation=self.lora_activation,
            entering=gate.scaled_dropout_of([gate, up]),
            leaving=down.scaled_dropout(),
        )
        return leave(down, y)

    def _layers(self) -> tuple[Any, Any, Any]:
        children, form = self._modules, self.lora_form
        return children.get(form.gate), children.get(form.up), children.get(form.down)


class MixedGatedMLP(LoRAGatedMLP):
    """Mixin of a gated MLP whose three layers have named adapters."""

    go_together = staticmethod(fit_together)

    @override
    def _layers(self) -> tuple[Any, Any, Any]:
        layers = super()._layers()
        hosts = [layer for layer in layers if isinstance(layer, LinearHost)]
        acting = hosts[0].lora_choice.acting if len(hosts) == len(layers) else None
        if isinstance(acting, Mixture):
            return (None, None, None) if torch.compiler.is_compiling() else layers
        gate, up, down = (host.adapters.get(acting) for host in hosts) if acting is not None else (None, None, None)
        return gate, up, down

    @override
    def _fused(self, x: Tensor) -> Tensor:
        gate, up, down = self._layers()
        if not isinstance(gate, LinearHost):
            return super()._fused(x)
        mixture: Any = gate.lora_choice.acting
        x = enter(gate, x)
        (tensors_gate, tensors_up, *pairs_in), entering = mixed_linears([gate, up], mixture, x)
        (tensors_down, *pairs_out), leaving = mixed_linears([down], mixture, x)
        y = lora_gated_mlp(
            x,
            tensors_gate,
            tensors_up,
            tensors_down,
            activation=self.lora_activation,
            entering=entering,
            leaving=leaving,
            pairs=(pairs_in, pairs_out),
        )
        return leave(down, y)


def _activation_of(module: nn.Module, form: GatedForm) -> str | None:
    return (
        form.activation if form.activation in ACTIVATIONS else activation_name(getattr(module, form.activation, None))
    )


def _is_split_inside(gate: Any, up: Any, down: Any) -> bool:
    """Whether the layers are whole, or split so that what lies between them is this rank's part of it."""
    if not any(isinstance(layer, SplitLinear) for layer in (gate, up, down)):
        return True
    if not all(isinstance(layer, SplitLinear) for layer in (gate, up, down)):
        return False
    columns = gate.tp_dim == up.tp_dim == 0 and not (gate.tp_whole_output or up.tp_whole_output)
    return bool(columns and down.tp_dim == 1 and not down.tp_whole_input)


def is_watched(module: nn.Module | None) -> bool:
    """Return True if a hook of a module sees its input or output."""
    return module is not None and has_hooks(module)


def fuse_gated_mlp(module: nn.Module) -> None:
    """Give a gated MLP whose three layers are adapted the class that computes them together."""
    kinds = {LoRALinear: LoRAGatedMLP, LinearHost: MixedGatedMLP}
    found = [cls for cls in kinds if sum(isinstance(child, cls) for child in module._modules.values()) >= 3]
    if not found or isinstance(module, SwappedModule):
        return
    cls = type(module)
    form: GatedForm | None = _registered.get(cls.forward) or form_of(cls, GATED_FORMS)
    if form is None:
        return
    missing = [name for name in form[:3] if name not in module._modules]
    if missing and cls.forward in _registered:
        raise ValueError(f"register_gated_mlp was told that {cls.__name__} has a layer {missing[0]!r}, and it has none")
    activation = _activation_of(module, form)
    if activation is not None and all(isinstance(module._modules.get(name), found[0]) for name in form[:3]):
        swap_class(module, kinds[found[0]])
        module.__dict__.update(lora_form=form, lora_activation=activation)
