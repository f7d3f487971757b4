"""Linear layers that their parent calls with one and the same tensor: q, k and v of an attention, gate and up.

The first one called computes them all, in one product for their A's and with one buffer for the gradient of x; the
others hand out what is there. Names, parameters and hooks of every layer stay its own.
"""

import operator
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_lora.fuse.structure import called_alike
from lightning_lora.layers.linear import LoRALinear
from lightning_lora.layers.split import SplitLinear
from lightning_lora.ops.linear import Factors, Term, autocast_dtype, is_transformed, lora_linears
from lightning_lora.ops.sharded import is_dtensor

MAX_WASTED = 3


class _Computed(NamedTuple):
    """What was computed of one tensor and not handed out yet."""

    x: Any  # weakref.ref[Tensor]
    mode: tuple[Any, ...]
    thread: int
    outputs: dict[int, Tensor]  # by place
    states: list[tuple[Any, ...]]  # of the layers, as they were


class Siblings:
    """The layers of one group, and what was computed of them for one tensor and not handed out yet.

    An output is handed out for the very tensor that it was computed of, unchanged, in the same mode of autograd, by a
    layer that is as it was. A layer that is called with another tensor computes alone, and the group is given up with
    the next optimizer step: its parent does what its code did not show. So it is when an output is not asked for,
    several times in a row, or not before another group is computed. Several threads may run one model: each finds its
    own outputs or computes them.
    """

    def __init__(self, layers: list[LoRALinear]) -> None:
        self.layers = layers
        self._computed: _Computed | None = None
        self._num_wasted = 0
        self._unfit_since: int | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"layers": self.layers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["layers"])  # type: ignore[misc]  # copies hold no outputs

    def _is_given_up(self, layer: LoRALinear) -> bool:
        """Whether layers that were found unfit go apart: not before they have trained on.

        What activation checkpointing runs again until then is what ran, with the same tensors kept and masks drawn.
        """
        if self._unfit_since is None:
            return False
        runs_once = not (layer.training or layer.drops or torch.is_grad_enabled())
        return runs_once or torch.compiler.is_compiling() or self._unfit_since != _num_changes(self.layers)

    def output(self, layer: LoRALinear, x: Tensor) -> Tensor | None:
        """Return what ``layer`` gives for ``x``; ``None`` if it is to compute that alone."""
        layers, computed, place = self.layers, self._computed, layer.lora_place
        if not layers or (not torch.compiler.is_compiling() and x.is_inference()):
            return None
        mode, thread = _mode(x), _thread()
        if computed is not None and computed.thread == thread:
            y = computed.outputs.get(place)
            if y is not None and computed.x() is x and computed.mode == mode and _is_as(layer, computed.states[place]):
                del computed.outputs[place]
                if not computed.outputs and self._computed is computed:
                    self._computed, self._num_wasted = None, 0
                return leave(layer, y)
            changed = y is not None and computed.x() is not None and computed.mode[1:] == mode[1:]
            self._waste(MAX_WASTED if changed else 1)
            if changed:
                return None
        if self._is_given_up(layer):
            self.layers, self._computed = [], None
            return None
        if is_transformed() or not all(can_fuse(one, x) for one in layers) or not go_together(layers, layer):
            return None
        outputs = dict(enumerate(all_outputs(x, layers, layer)))
        y = outputs.pop(place)
        self._computed = _Computed(weakref.ref(x), mode, thread, outputs, [_state(one) for one in layers])
        if not torch.compiler.is_compiling():
            self._let_others_go()
        return leave(layer, y)

    def _let_others_go(self) -> None:
        """Drop what the group that was computed before in this thread still holds.

        Its parent failed, as for want of memory, and the graph of the step until then would be kept.
        """
        former = _last.group()
        computed = None if former is None or former is self else former._computed
        if former is not None and computed is not None and computed.thread == _thread():
            former._computed = None
            former._waste(1)
        _last.group = weakref.ref(self)

    def _waste(self, times: int) -> None:
        self._num_wasted += times
        if self._unfit_since is None and self._num_wasted >= MAX_WASTED:
            self._unfit_since = _num_changes(self.layers)


class _Last(threading.local):
    group: Callable[[], Siblings | None] = staticmethod(lambda: None)  # weakref.ref[Siblings]


_last = _Last()


def all_outputs(x: Tensor, layers: list[LoRALinear], first: LoRALinear) -> Sequence[Tensor]:
    """Return what each layer gives of ``x``, before it leaves."""
    entered, own_term, all_factors = enter(first, x), term(first), [factors(one) for one in layers]
    if torch.is_grad_enabled() and not torch.compiler.is_compiling() and not x.requires_grad:
        # a backward pass frees no graph before x: callers may run one through each output by itself
        return [lora_linears(entered, [one], own_term)[0] for one in all_factors]
    return lora_linears(entered, all_factors, own_term)


def _thread() -> int:
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


def _state(layer: LoRALinear) -> tuple[Any, ...]:
    """Return what an output of a layer depends on beside its input, tensors first."""
    if torch.compiler.is_compiling():
        return (), ()
    tensors = [tensor for tensor in layer._parameters.values() if tensor is not None]
    versions = [(_version(tensor), tensor.requires_grad) for tensor in tensors]
    return tensors, (versions, layer.drops, layer.lora_scaling, layer.lora_dropout)


def _num_changes(layers: list[LoRALinear]) -> int:
    """Return how often the adapters of layers were changed."""
    factors_ = [tensor for layer in layers for tensor in (layer.lora_A, layer.lora_B)]
    return 0 if torch.compiler.is_compiling() else sum(_version(tensor) for tensor in factors_)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _is_as(layer: LoRALinear, former: tuple[Any, ...]) -> bool:
    """Whether a layer is as it was when :func:`_state` looked."""
    (tensors, rest), (former_tensors, former_rest) = _state(layer), former
    same = len(tensors) == len(former_tensors) and all(map(operator.is_, tensors, former_tensors))
    return same and rest == former_rest


def group_siblings(parent: nn.Module) -> None:
    """Let layers share their products where the code of their parent calls them with one tensor."""
    adapted = {name: child for name, child in parent._modules.items() if isinstance(child, LoRALinear)}
    if len(adapted) < 2:
        return
    parent_class: Any = type(parent)
    for names in called_alike(parent_class):
        layers = [adapted[name] for name in names if name in adapted and _is_plain(adapted[name])]
        layers = [layer for layer in layers if layer.lora_siblings is None]
        if len(layers) > 1 and go_together(layers, layers[0]):
            siblings = Siblings(layers)
            for place, layer in enumerate(layers):
                layer.__dict__.update(lora_siblings=siblings, lora_place=place)


def can_fuse(layer: nn.Module, x: Tensor) -> bool:
    """Whether the product of an adapted layer may be computed by another module, at the present moment."""
    if not isinstance(layer, LoRALinear) or not layer.lora_active or layer._forward_pre_hooks:
        return False  # a hook may make the weight
    if not _is_plain(layer) or "forward" in layer.__dict__:
        return False
    weight = layer.weight
    # parents may cast between layers of several dtypes
    is_one_dtype = weight.dtype == x.dtype or autocast_dtype(x) is not None
    return is_one_dtype and not is_dtensor(weight) and weight.device == x.device


def _is_plain(layer: LoRALinear) -> bool:
    """Whether the layer is W and B A, with no magnitude, bias or start of its own and no other forward."""
    mixin, base = type(layer).__bases__[0], layer.lora_base_class
    return issubclass(base, SplitLinear) or (mixin is LoRALinear and base.forward is nn.Linear.forward)


def go_together(layers: list[LoRALinear], first: LoRALinear) -> bool:
    """Whether layers with one input can share products, masks and the factor of their adapters."""
    kind, in_features, dtype = type(first).__bases__[0], first.lora_A.shape[1], first.lora_A.dtype
    return not (isinstance(first, SplitLinear) and first.tp_dim == 1) and all(
        type(layer).__bases__[0] is kind
        and layer.lora_A.shape[1] == in_features
        and layer.lora_A.dtype == dtype
        and layer.lora_scaling == first.lora_scaling
        and layer.lora_dropout == first.lora_dropout
        and (not layer.lora_dropout or layer.drops == first.drops)
        for layer in layers
    )


def _mode(x: Tensor) -> tuple[Any, ...]:
    version = 0 if torch.compiler.is_compiling() else x._version
    return version, torch.is_grad_enabled(), autocast_dtype(x), x.requires_grad


def enter(layer: nn.Module, x: Tensor) -> Tensor:
    """Return what this rank multiplies of the input of ``layer``."""
    return layer.enter(x) if isinstance(layer, SplitLinear) else x


def leave(layer: nn.Module, y: Tensor) -> Tensor:
    """Return what ``layer`` gives of this rank's product."""
    return layer.leave(y) if isinstance(layer, SplitLinear) else y


def factors(layer: LoRALinear) -> Factors:
    """Return the tensors of this rank's product."""
    bias = layer.local_bias() if isinstance(layer, SplitLinear) else layer.bias
    return Factors(layer.weight, bias, layer.lora_A, layer.lora_B)


def term(layer: LoRALinear) -> Term:
    """Return how the layer's adapter enters in one call, with a seed of its own for dropout."""
    return Term(layer.lora_scaling, layer.lora_dropout, layer.dropout_seed(), layer.dropout_columns())
