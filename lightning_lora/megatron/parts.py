"""Tag each tensor of a Megatron-core model with the part of the whole tensor that it is, and cut adapters likewise."""

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from lightning_lora.compat.torch import forward_hooks
from lightning_lora.layers.host import adapters_of
from lightning_lora.megatron.core import is_column, is_gpt, is_parallel_linear, is_vocabulary, mesh_of
from lightning_lora.megatron.names import stack_in
from lightning_lora.model.names import clean_name
from lightning_lora.model.spread import guard_parts
from lightning_lora.ops.sharded import is_sharded, split_over


def keep_parts(root: nn.Module) -> None:
    """Tag the tensors of Megatron-core's layers as parts of whole ones, and keep of their adapters this rank's part.

    What is whole on every rank and whose gradient is one rank's addend of the true one is marked ``lora_tp_sum``.
    Models without such layers, and those on one rank, are left as they are, as is everything at a second call.
    Communicates nothing.
    """
    modules = {clean_name(name): module for name, module in root.named_modules()}
    for name, module in modules.items():
        if "lora_host" in module.__dict__:
            continue  # an adapter, which is cut with its host
        if is_parallel_linear(module) and _size(module) > 1:
            stack = stack_in(modules, name)
            _keep_linear(module, stripes=1 if stack is None else stack.stripes)
        elif is_vocabulary(module) and _size(module) > 1:
            _tag(module, "weight", 0)
    for module in modules.values():
        if is_gpt(module):
            _mark_addends(module)
            guard_parts(module)


def check_built(model: nn.Module, size: int) -> None:
    """Raise ``ValueError`` for a model of Megatron-core's that was built for another number of ranks, or on meta."""
    for name, layer in model.named_modules():
        if is_parallel_linear(layer) and _size(layer) != size:
            raise ValueError(
                f"{type(model).__name__} was built for tensor_parallel_size={_size(layer)} ({name}), and runs on "
                f"{size}: build it in configure_model, when the strategy has set up Megatron-core's groups"
            )
        for local, parameter in layer._parameters.items():
            if parameter is not None and parameter.device.type == "meta":
                raise ValueError(
                    f"{name}.{local} of {type(model).__name__} is on the meta device: build Megatron-core's models "
                    "with memory (each rank has its parts alone), and give the strategy base_weights= or call "
                    "load_hf_weights(model, path)"
                )


def let_gradients_through_recomputed(model: Any) -> None:
    """Make the embedding's output require grad, which it would not when all before the first adapter is frozen.

    A recomputed block whose input does not require grad gives an output that does not, and its adapters no gradients.
    """
    embedding = getattr(model, "embedding", None)
    if embedding is None or model.config.recompute_granularity is None:
        return
    if _require_grad not in forward_hooks(embedding).values():
        embedding.register_forward_hook(_require_grad)


def _require_grad(_: nn.Module, __: Any, output: torch.Tensor) -> None:
    if torch.is_grad_enabled() and not output.requires_grad:
        output.requires_grad_(True)


def _keep_linear(layer: Any, *, stripes: int) -> None:
    column = is_column(layer)
    dim = 0 if column else 1
    _tag(layer, "weight", dim, stripes)
    if column:
        _tag(layer, "bias", 0, stripes)
    for adapter in adapters_of(layer):
        for name in adapter.adapter_names:
            if name.startswith("lora_B") is not column:
                getattr(adapter, name).lora_tp_sum = True
            elif not is_sharded(getattr(adapter, name)):
                keep_part(adapter, name, _mesh(layer), dim, stripes if name == "lora_B" else 1)


def keep_part(layer: nn.Module, name: str, mesh: DeviceMesh, dim: int, stripes: int = 1) -> None:
    """Replace a whole parameter by this rank's part of it, in a tagged tensor of its own."""
    whole = layer._parameters[name]
    assert whole is not None
    pieces = [stripe.chunk(mesh.size(), dim)[mesh.get_local_rank()] for stripe in whole.detach().chunk(stripes, dim)]
    part = nn.Parameter(torch.cat(pieces, dim), whole.requires_grad)
    split_over(part, mesh, dim, stripes)
    layer._parameters[name] = part


def _tag(layer: Any, name: str, dim: int, stripes: int = 1) -> None:
    parameter = layer._parameters.get(name)
    if parameter is not None and not is_sharded(parameter):
        split_over(parameter, _mesh(layer), dim, stripes)


def _mesh(layer: Any) -> DeviceMesh:
    return mesh_of(layer.tp_group, "cuda" if torch.distributed.get_backend(layer.tp_group) == "nccl" else "cpu")


def _size(layer: Any) -> int:
    """Return over how many ranks a layer is spread: by its sizes, since one built too early has no group."""
    for whole in ("output_size", "input_size", "num_embeddings"):
        if hasattr(layer, f"{whole}_per_partition"):
            return int(getattr(layer, whole) // getattr(layer, f"{whole}_per_partition"))
    return 1


def _mark_addends(model: nn.Module) -> None:
    """Mark what works on this rank's heads, or on its part of the sequence, should it train."""
    for name, parameter in model.named_parameters():
        on_heads = ".q_layernorm." in name or ".k_layernorm." in name
        if not is_sharded(parameter) and (on_heads or getattr(parameter, "sequence_parallel", False)):
            parameter.lora_tp_sum = True  # type: ignore[attr-defined]
