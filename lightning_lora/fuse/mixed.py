"""What a group of hosts computes together while a mixture acts in them, as :mod:`lightning_lora.fuse.linears` does."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_lora.fuse.linears import go_together, tensor_version
from lightning_lora.layers.acting import Mixture
from lightning_lora.layers.linear import LoRALinear
from lightning_lora.layers.linear_host import LinearHost, compute_together, mixed_linears
from lightning_lora.layers.split import SplitLinear, enter
from lightning_lora.ops.linear import lora_linears
from lightning_lora.ops.linear_tensors import LinearTensors
from lightning_lora.ops.mixture import Shares


def has_linear_adapters(host: LinearHost) -> bool:
    """Return True if all adapters of a host are those of a linear layer."""
    return all(isinstance(layer, LoRALinear) for layer in host.adapters.values())


def mix_together(hosts: list[LinearHost], first: LinearHost) -> bool:
    """Return True if hosts with one input can share the products of their adapters with ``first``."""
    widths = {layer.lora_A.shape[1] for host in (first, *hosts) for layer in host.adapters.values()}
    are_stored = {host.lora_stored is None for host in (first, *hosts)}
    return len(widths) == len(are_stored) == 1 and not (isinstance(first, SplitLinear) and first.tp_dim == 1)


def fit_together(layers: list[Any], first: Any) -> bool:
    """Return True if layers with one input go together, be they hosts or the adapters that act in them."""
    return mix_together(layers, first) if isinstance(first, LinearHost) else go_together(layers, first)


def mixed_state(host: LinearHost) -> tuple[list[Tensor], Any]:
    """Return what an output of a host depends on beside its input."""
    if torch.compiler.is_compiling():
        return [], ()
    parameters = [host._parameters, *(layer._parameters for layer in host.adapters.values())]
    tensors: list[Tensor] = [tensor for own in parameters for tensor in own.values() if tensor is not None]
    versions = [(tensor_version(tensor), tensor.requires_grad) for tensor in tensors]
    settings = [(layer.drops, layer.lora_active, layer.lora_scaling) for layer in host.adapters.values()]
    return tensors, (host.lora_choice.acting, versions, settings)


def num_mixed_updates(hosts: list[LinearHost]) -> int:
    """Return how often the adapters of hosts were written."""
    layers = [layer for host in hosts for layer in host.adapters.values()]
    return sum(tensor_version(tensor) for layer in layers for _, tensor in layer.named_adapter_tensors())


def compute_mixed(x: Tensor, hosts: list[LinearHost], leader: LinearHost) -> Sequence[Tensor]:
    """Return what each host's product gives for ``x``, before :func:`~lightning_lora.layers.split.leave`."""
    mixture = leader.lora_choice.acting
    assert isinstance(mixture, Mixture)
    entered = enter(leader, x)
    if torch.compiler.is_compiling() or x.requires_grad or not torch.is_grad_enabled():
        return compute_together(hosts, mixture, entered)
    # a backward pass frees no graph before x: callers may run one through each output by itself
    tensors, shares = mixed_linears(hosts, mixture, entered)
    return [lora_linears(entered, *_of_one(place, tensors, shares))[0] for place in range(len(hosts))]


def _of_one(place: int, tensors: Sequence[LinearTensors], shares: Shares) -> tuple[list[LinearTensors], Shares]:
    """Return the tensors and shares of the host at one place of a group."""
    own, kept, seeds, start = [tensors[place]], [], [], shares.num_layers
    for i, share in enumerate(shares.shares):
        if place in share.layers:
            own.append(tensors[start + share.layers.index(place)])
            kept.append(share._replace(layers=(0,)))
            seeds.append(i)
        start += len(share.layers)
    seed = None if shares.seed is None else shares.seed[seeds]
    return own, Shares(tuple(kept), 1, seed)
