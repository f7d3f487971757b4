"""Linear layers that read one input, such as q, k and v of an attention, computed by one function.

The first layer that is called computes the outputs of all; the others return theirs if they are called with the same
tensor. All A's are then one product, the gradients of x are summed in one buffer, and one dropout mask serves all.
"""

import threading
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.compat.torch import is_transformed
from lightning_lora.fuse.linears import can_fuse, compute_all, go_together, num_updates, state_of, tensor_version
from lightning_lora.fuse.mixed import (
    compute_mixed,
    has_linear_adapters,
    mix_together,
    mixed_state,
    num_mixed_updates,
)
from lightning_lora.layers.host import AdaptersByName
from lightning_lora.layers.linear import LoRALinear, is_plain
from lightning_lora.layers.linear_host import LinearHost
from lightning_lora.layers.split import leave
from lightning_lora.ops.autocast import autocast_dtype
from lightning_lora.ops.dropout import LayerSeeds, Seeds, SharedSeeds

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
        self.states = [siblings.state_of(layer) for layer in layers]
        self.waiting: dict[int, Tensor] = dict(enumerate(siblings.compute_all(x, layers, leader)))  # by place
        self.any_read = False

    def take(self, siblings: "Siblings", layer: LoRALinear, x: Tensor) -> Tensor | None:
        """Return the output of ``layer`` if it was computed from this very tensor and nothing has changed since."""
        place = layer.lora_place
        if self.siblings is not siblings or self.x is not x or place not in self.waiting:
            return None
        if self.mode != _mode(x) or not _same_state(self.states[place], siblings.state_of(layer)):
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


class Siblings:  # of LoRALinear, or of LinearHost
    """A group of layers that are computed together for as long as their parent calls them with one tensor.

    When outputs are computed three times in a row that their layers do not return, those layers leave the group; if no
    layer but the first returns its output, that first layer leaves. Layers leave with the next optimizer step: until
    then activation checkpointing recomputes what was computed.
    """

    go_together: Callable[..., Any] = staticmethod(go_together)
    compute_all: Callable[..., Any] = staticmethod(compute_all)
    state_of: Callable[..., Any] = staticmethod(state_of)
    num_updates: Callable[..., Any] = staticmethod(num_updates)

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
            self.leaving_since = self.num_updates(self.layers)

    def _layers_to_compute(self, leader: LoRALinear, x: Tensor) -> list[LoRALinear]:
        """Return the layers to compute together for ``x``; none where the layer is to compute alone."""
        if self.leaving and self._may_leave(leader):
            self._let_leave()
        layers = self.layers
        may_fuse = len(layers) > 1 and leader.lora_siblings is self and not is_transformed()
        may_fuse = may_fuse and all(can_fuse(one, x) for one in layers) and self.go_together(layers, leader)
        return layers if may_fuse else []

    def _may_leave(self, layer: LoRALinear) -> bool:
        runs_once = not (layer.training or layer.drops or torch.is_grad_enabled())
        return runs_once or torch.compiler.is_compiling() or self.leaving_since != self.num_updates(self.layers)

    def _let_leave(self) -> None:
        for one in self.leaving:
            one.__dict__.update(lora_siblings=None)
        self.layers = [one for one in self.layers if one not in self.leaving]
        for place, one in enumerate(self.layers):
            one.__dict__.update(lora_place=place)
        self.leaving, self.num_unread = [], 0


class MixedSiblings(Siblings):
    """The same for hosts of named adapters, while a mixture acts in them."""

    go_together = staticmethod(mix_together)
    compute_all = staticmethod(compute_mixed)
    state_of = staticmethod(mixed_state)
    num_updates = staticmethod(num_mixed_updates)


def group_siblings(parent: nn.Module) -> None:
    """Let the layers of a module share their products where their names say that they may read one input."""
    if isinstance(parent, AdaptersByName):
        return  # their names are those of adapters
    adapted = {name: child for name, child in parent._modules.items() if isinstance(child, LoRALinear)}
    _group(Siblings, {name: layer for name, layer in adapted.items() if is_plain(layer)})
    hosts = {name: child for name, child in parent._modules.items() if isinstance(child, LinearHost)}
    _group(MixedSiblings, {name: host for name, host in hosts.items() if has_linear_adapters(host)})
    for adapter in dict.fromkeys(name for host in hosts.values() for name in host.adapters):
        own = {name: host.adapters.get(adapter) for name, host in hosts.items()}
        _group(Siblings, {n: layer for n, layer in own.items() if isinstance(layer, LoRALinear) and is_plain(layer)})


def share_seeds(adapted: Mapping[str, Any], seeds: Seeds) -> None:
    """Let the layers of a named adapter draw one seed of dropout for each input that several of them read.

    So their masks do not depend on whether they are computed together.

    Args:
        adapted: the layers by the names of their bases.
        seeds: of the adapter.
    """
    for parent in dict.fromkeys(name.rpartition(".")[0] for name in adapted):
        own = {name.rpartition(".")[2]: layer for name, layer in adapted.items() if name.rpartition(".")[0] == parent}
        for names in [*GROUPS, *([name] for name in own)]:
            layers = [own[name] for name in names if name in own and own[name].lora_seeds is None]
            if len(layers) > 1 or len(names) == 1:
                shared = SharedSeeds(seeds, len(layers))
                for place, layer in enumerate(layers):
                    layer.__dict__["lora_seeds"] = LayerSeeds(shared, place)


def _group(kind: type[Siblings], named: Mapping[str, Any]) -> None:
    if len(named) < 2:
        return
    for names in GROUPS:
        layers = [named[name] for name in names if name in named]
        layers = [one for one in layers if one.lora_siblings is None and kind.go_together([one], layers[0])]
        if len(layers) > 1:
            siblings = kind(layers)
            for place, layer in enumerate(layers):
                layer.__dict__.update(lora_siblings=siblings, lora_place=place)


def _mode(x: Tensor) -> tuple[Any, ...]:
    return tensor_version(x), torch.is_grad_enabled(), autocast_dtype(x), x.requires_grad


def _same_state(before: tuple[list[Tensor], Any], now: tuple[list[Tensor], Any]) -> bool:
    (tensors, settings), (tensors_now, settings_now) = before, now
    return settings == settings_now and all(a is b for a, b in zip(tensors, tensors_now, strict=True))
