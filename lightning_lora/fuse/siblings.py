"""Linear layers that read one input, such as q, k and v of an attention, computed by one function.

The first layer that is called computes the outputs of all; the others return theirs if they are called with the same
tensor. All A's are then one product, the gradients of x are summed in one buffer, and one dropout mask serves all.
"""

import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.compat.torch import forward_pre_hooks, is_transformed, version_of
from lightning_lora.layers.linear import LoRALinear
from lightning_lora.layers.split import SplitLinear
from lightning_lora.ops.autocast import autocast_dtype
from lightning_lora.ops.linear import lora_linears
from lightning_lora.ops.linear_tensors import LinearTensors, StoredLinearTensors
from lightning_lora.ops.sharded import is_dtensor

# Names of layers of one module that may read one input. A wrong group costs three products that nobody reads.
GROUPS = [
    line.split()
    for line in """\
q_proj k_proj v_proj gate_proj g_proj b_proj a_proj r_proj g_a_proj sink_proj v_proj_current
query key value
query_proj key_proj value_proj
q k v ogate_preact igate_preact fgate_preact
to_q to_k to_v to_kv
q_lin k_lin v_lin
linear_q linear_k linear_v
linear_x linear_y
to_query to_key
layout_query layout_key layout_value
project_q project_k project_v
q_content_proj k_content_proj v_proj
q_pos_proj k_pos_proj
q_a_proj kv_a_proj_with_mqa kv_proj g_proj gate_proj
in_proj_qkv in_proj_z in_proj_b in_proj_a
in_proj_qkvz in_proj_ba
qkv_proj output_gate
sampling_offsets attention_weights
gate_proj up_proj
proj_up_gate proj_up
w1 w3
wi_0 wi_1
w_0 w_1
vision_proj values_vision_proj
text_proj values_text_proj
input_layer residual_layer
""".splitlines()
]
MAX_UNREAD = 3


class _Outputs:
    """The outputs for one tensor that their layers have not returned yet."""

    def __init__(self, siblings: "Siblings", layers: list[LoRALinear], leader: LoRALinear, x: Tensor) -> None:
        self.siblings, self.layers, self.leader, self.x = siblings, layers, leader, x
        self.mode = _mode(x)
        self.states = [_state(layer) for layer in layers]
        self.waiting: dict[int, Tensor] = dict(enumerate(compute_all(x, layers, leader)))  # by place
        self.any_read = False

    def take(self, siblings: "Siblings", layer: LoRALinear, x: Tensor) -> Tensor | None:
        """Return the output of ``layer`` if it was computed from this very tensor and nothing has changed since."""
        place = layer.lora_place
        if self.siblings is not siblings or self.x is not x or place not in self.waiting:
            return None
        if self.mode != _mode(x) or not _same_state(self.states[place], _state(layer)):
            return None
        self.any_read = True
        return self.waiting.pop(place)


class _LatestInGraph:
    """The same while torch.compile traces, which does not follow thread-local attributes."""

    def __init__(self) -> None:
        self.outputs: _Outputs | None = None


class _Latest(threading.local):
    """The latest :class:`_Outputs` of this thread; what is left of them is freed when the next ones are computed.

    Their group owns them, so that they are freed with its model, too.
    """

    group: "Callable[[], Siblings | None]" = staticmethod(lambda: None)  # weakref.ref[Siblings]

    @property
    def outputs(self) -> _Outputs | None:
        group = self.group()
        return None if group is None else group.held.get(threading.get_ident())

    @outputs.setter
    def outputs(self, outputs: _Outputs | None) -> None:
        group, thread = self.group(), threading.get_ident()
        if group is not None:
            group.held.pop(thread, None)
        if outputs is not None:
            outputs.siblings.held[thread] = outputs
            self.group = weakref.ref(outputs.siblings)


_latest = _Latest()
_latest_in_graph = _LatestInGraph()


class Siblings:
    """A group of layers that are computed together for as long as their parent calls them with one tensor.

    When outputs are computed three times in a row that their layers do not return, those layers leave the group; if no
    layer but the first returns its output, that first layer leaves. Layers leave with the next optimizer step: until
    then activation checkpointing recomputes what was computed.
    """

    def __init__(self, layers: list[LoRALinear]) -> None:
        self.layers = layers
        self.held: dict[int, _Outputs] = {}  # by thread
        self.num_unread = 0
        self.leaving: list[LoRALinear] = []
        self.leaving_since = 0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "held": {}}

    def output(self, layer: LoRALinear, x: Tensor) -> Tensor | None:
        """Return what ``layer`` gives for ``x``; ``None`` if the layer has to compute it alone."""
        is_compiling = torch.compiler.is_compiling()
        if not is_compiling and x.is_inference():  # without a version to see changes by
            return None
        latest: Any = _latest_in_graph if is_compiling else _latest
        outputs: _Outputs | None = latest.outputs
        y = None if outputs is None else outputs.take(self, layer, x)
        if y is None:
            if outputs is not None:
                latest.outputs = None
                outputs.siblings.note_unread(outputs)
            layers = self._layers_to_compute(layer, x)
            if not layers:
                return None
            outputs = latest.outputs = _Outputs(self, layers, layer, x)
            y = outputs.waiting.pop(layer.lora_place)
        assert outputs is not None
        if not outputs.waiting:
            latest.outputs = None
            self.num_unread = 0
        return leave(layer, y)

    def note_unread(self, outputs: _Outputs) -> None:
        """Count outputs that were computed for nothing; after some in a row, decide which layers leave."""
        self.num_unread += 1
        if self.num_unread >= MAX_UNREAD and not self.leaving:
            unread = [outputs.layers[place] for place in outputs.waiting]
            self.leaving = unread if outputs.any_read else [outputs.leader]
            self.leaving_since = _num_updates(self.layers)

    def _layers_to_compute(self, leader: LoRALinear, x: Tensor) -> list[LoRALinear]:
        """Return the layers to compute together for ``x``; none where the layer is to compute alone."""
        if self.leaving and self._may_leave(leader):
            self._let_leave()
        layers = self.layers
        may_fuse = len(layers) > 1 and leader.lora_siblings is self and not is_transformed()
        may_fuse = may_fuse and all(can_fuse(one, x) for one in layers) and go_together(layers, leader)
        return layers if may_fuse else []

    def _may_leave(self, layer: LoRALinear) -> bool:
        runs_once = not (layer.training or layer.drops or torch.is_grad_enabled())
        return runs_once or torch.compiler.is_compiling() or self.leaving_since != _num_updates(self.layers)

    def _let_leave(self) -> None:
        for one in self.leaving:
            one.__dict__.update(lora_siblings=None)
        self.layers = [one for one in self.layers if one not in self.leaving]
        for place, one in enumerate(self.layers):
            one.__dict__.update(lora_place=place)
        self.leaving, self.num_unread = [], 0


def group_siblings(parent: nn.Module) -> None:
    """Let the layers of a module share their products where their names say that they may read one input."""
    adapted = {name: child for name, child in parent._modules.items() if isinstance(child, LoRALinear)}
    if len(adapted) < 2:
        return
    for names in GROUPS:
        layers = [adapted[name] for name in names if name in adapted and _is_plain(adapted[name])]
        layers = [layer for layer in layers if layer.lora_siblings is None and go_together([layer], layers[0])]
        if len(layers) > 1:
            siblings = Siblings(layers)
            for place, layer in enumerate(layers):
                layer.__dict__.update(lora_siblings=siblings, lora_place=place)


def can_fuse(layer: nn.Module, x: Tensor) -> bool:
    """Return True if another module may compute the product of an adapted layer for ``x``."""
    if not isinstance(layer, LoRALinear) or not layer.lora_active or forward_pre_hooks(layer):
        return False  # a hook may make the weight
    if not _is_plain(layer) or "forward" in layer.__dict__:
        return False
    if layer.lora_stored is not None:
        stored = layer.lora_stored.product(layer, x)
        return stored is not None and stored.device == x.device and not _is_in_shards(layer)
    weight = layer.weight
    # parents may cast between layers of several dtypes
    is_one_dtype = weight.dtype == x.dtype or autocast_dtype(x) is not None
    return is_one_dtype and not is_dtensor(weight) and weight.device == x.device


def _is_in_shards(layer: nn.Module) -> bool:
    return any(is_dtensor(parameter) for parameter in layer._parameters.values() if parameter is not None)


def go_together(layers: list[LoRALinear], first: LoRALinear) -> bool:
    """Return True if layers with one input can share products, masks and scaling with ``first``."""
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


def _is_plain(layer: LoRALinear) -> bool:
    """Return True if the layer is W and B A, without a magnitude, bias or start of its own or another forward."""
    mixin, base = type(layer).__bases__[0], layer.lora_base_class
    is_product = base.forward is nn.Linear.forward or layer.lora_stored is not None
    return issubclass(base, SplitLinear) or (mixin is LoRALinear and is_product)


def compute_all(x: Tensor, layers: list[LoRALinear], leader: LoRALinear) -> Sequence[Tensor]:
    """Return what each layer's product gives for ``x``, before :func:`leave`."""
    entered, settings, all_factors = enter(leader, x), leader.scaled_dropout(), [factors(one, x) for one in layers]
    if torch.is_grad_enabled() and not torch.compiler.is_compiling() and not x.requires_grad:
        # a backward pass frees no graph before x: callers may run one through each output by itself
        return [lora_linears(entered, [one], settings)[0] for one in all_factors]
    return lora_linears(entered, all_factors, settings)


def _mode(x: Tensor) -> tuple[Any, ...]:
    return _version(x), torch.is_grad_enabled(), autocast_dtype(x), x.requires_grad


def _state(layer: LoRALinear) -> tuple[list[Tensor], Any]:
    """Return what an output of a layer depends on beside its input: its tensors, their versions, its settings."""
    if torch.compiler.is_compiling():
        return [], ()
    tensors: list[Tensor] = [tensor for tensor in layer._parameters.values() if tensor is not None]
    versions = [(_version(tensor), tensor.requires_grad) for tensor in tensors]
    return tensors, (versions, layer.drops, layer.lora_scaling, layer.lora_dropout)


def _same_state(before: tuple[list[Tensor], Any], now: tuple[list[Tensor], Any]) -> bool:
    (tensors, settings), (tensors_now, settings_now) = before, now
    return settings == settings_now and all(a is b for a, b in zip(tensors, tensors_now, strict=True))


def _num_updates(layers: list[LoRALinear]) -> int:
    """Return how often the adapters of layers were written."""
    return sum(_version(tensor) for layer in layers for tensor in (layer.lora_A, layer.lora_B))


def _version(tensor: Tensor) -> int:
    return 0 if torch.compiler.is_compiling() or tensor.is_inference() else version_of(tensor)


def enter(layer: nn.Module, x: Tensor) -> Tensor:
    """Return what this rank multiplies of the input of ``layer``."""
    return layer.enter(x) if isinstance(layer, SplitLinear) else x


def leave(layer: nn.Module, y: Tensor) -> Tensor:
    """Return what ``layer`` gives of this rank's product."""
    return layer.leave(y) if isinstance(layer, SplitLinear) else y


def factors(layer: LoRALinear, x: Tensor) -> LinearTensors:
    """Return the tensors of this rank's product with ``x``, for which :func:`can_fuse` is true."""
    bias = layer.local_bias() if isinstance(layer, SplitLinear) else layer.bias
    if layer.lora_stored is not None:
        return StoredLinearTensors(layer.lora_stored.product(layer, x), bias, layer.lora_A, layer.lora_B)
    return LinearTensors(layer.weight, bias, layer.lora_A, layer.lora_B)
