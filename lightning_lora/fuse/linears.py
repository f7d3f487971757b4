"""What a group of adapted linear layers computes together, and on what an output of a layer depends."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.compat.torch import forward_pre_hooks, version_of
from lightning_lora.layers.linear import LoRALinear, is_plain
from lightning_lora.layers.linear_host import LinearHost
from lightning_lora.layers.split import SplitLinear, enter
from lightning_lora.ops.autocast import autocast_dtype
from lightning_lora.ops.linear import lora_linears
from lightning_lora.ops.linear_tensors import LinearTensors, StoredLinearTensors
from lightning_lora.ops.sharded import is_dtensor


def can_fuse(layer: nn.Module, x: Tensor) -> bool:
    """Return True if another module may compute the product of an adapted layer, or of a mixture in a host."""
    base = layer
    if isinstance(layer, LoRALinear):
        if not (layer.lora_active and is_plain(layer)):
            return False
        host: Any = layer.lora_host
        if host is not None and host.lora_choice.is_apart:
            return False  # the rows of a layer's input are a new tensor in each of its siblings
        base = layer if host is None else host  # base_layer, without a call
    elif not (isinstance(layer, LinearHost) and layer.is_product(x)):
        return False
    if forward_pre_hooks(base) or "forward" in base.__dict__:
        return False  # a hook may make the weight
    if layer.lora_stored is not None:
        stored = layer.lora_stored.product(layer, x)
        return stored is not None and stored.device == x.device and not _is_in_shards(base)
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


def compute_all(x: Tensor, layers: list[LoRALinear], leader: LoRALinear) -> Sequence[Tensor]:
    """Return what each layer's product gives for ``x``, before :func:`leave`."""
    entered, settings, all_factors = (
        enter(leader, x),
        leader.scaled_dropout_of(layers),
        [factors(one, x) for one in layers],
    )
    if torch.is_grad_enabled() and not torch.compiler.is_compiling() and not x.requires_grad:
        # a backward pass frees no graph before x: callers may run one through each output by itself
        return [lora_linears(entered, [one], settings)[0] for one in all_factors]
    return lora_linears(entered, all_factors, settings)


def factors(layer: LoRALinear, x: Tensor) -> LinearTensors:
    """Return the tensors of this rank's product with ``x``, for which :func:`can_fuse` is true."""
    bias = layer.local_bias() if isinstance(layer, SplitLinear) else layer.bias
    if layer.lora_stored is not None:
        return StoredLinearTensors(layer.lora_stored.product(layer, x), bias, layer.lora_A, layer.lora_B)
    return LinearTensors(layer.weight, bias, layer.lora_A, layer.lora_B)


def state_of(layer: LoRALinear) -> tuple[list[Tensor], Any]:
    """Return what an output of a layer depends on beside its input: its tensors, their versions, its settings."""
    if torch.compiler.is_compiling():
        return [], ()
    tensors: list[Tensor] = [tensor for tensor in layer._parameters.values() if tensor is not None]
    if layer.lora_host is not None:
        tensors += [tensor for tensor in layer.lora_host._parameters.values() if tensor is not None]
    versions = [(tensor_version(tensor), tensor.requires_grad) for tensor in tensors]
    return tensors, (versions, layer.drops, layer.lora_scaling, layer.lora_dropout)


def num_updates(layers: list[LoRALinear]) -> int:
    """Return how often the adapters of layers were written."""
    return sum(tensor_version(tensor) for layer in layers for tensor in (layer.lora_A, layer.lora_B))


def tensor_version(tensor: Tensor) -> int:
    """Return how often a tensor was written, 0 where that is not known."""
    return 0 if torch.compiler.is_compiling() or tensor.is_inference() else version_of(tensor)
