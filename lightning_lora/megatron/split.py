"""Tag each tensor of a Megatron-core model with the part of the whole tensor that it is, and cut adapters likewise."""

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from lightning_lora.compat.torch import forward_hooks
from lightning_lora.layers import LoRALayer
from lightning_lora.megatron.core import is_column, is_gpt, is_parallel_linear, is_vocabulary
from lightning_lora.megatron.stack import stack_in
from lightning_lora.model.names import clean_name
from lightning_lora.model.spread import guard_parts
from lightning_lora.ops.sharded import is_sharded, split_over

_MESHES: dict[Any, DeviceMesh] = {}


def keep_parts(root: nn.Module) -> None:
    """Tag the tensors of Megatron-core's layers as parts of whole ones, and keep of their adapters this rank's part.

    What is whole on every rank and whose gradient is one rank's addend of the true one is marked ``lora_tp_sum``.
    Models without such layers, and those on one rank, are left as they are, as is everything at a second call.
    Communicates nothing.
    """
    modules = {clean_name(name): module for name, module in root.named_modules()}
    for name, module in modules.items():
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
    if embedding is None or model.config.recompute_granularity is None or _require_grad in _hooks(embedding):
        return
    embedding.register_forward_hook(_require_grad)


def _hooks(module: nn.Module) -> list[Any]:
    return list(forward_hooks(module).values())


def _require_grad(_: nn.Module, __: Any, output: torch.Tensor) -> None:
    if torch.is_grad_enabled() and not output.requires_grad:
        output.requires_grad_(True)


def mesh_of(group: Any, device_type: str) -> DeviceMesh:
    """Return the one-dimensional mesh of a process group, the same object on every call."""
    if group not in _MESHES:
        _MESHES[group] = DeviceMesh.from_group(group, device_type)
    return _MESHES[group]


def _keep_linear(layer: Any, *, stripes: int) -> None:
    column = is_column(layer)
    _tag(layer, "weight", 0 if column else 1, stripes)
    if column:
        _tag(layer, "bias", 0, stripes)
    if not isinstance(layer, LoRALayer):
        return
    for name in layer.adapter_names:
        is_B = name.startswith("lora_B")
        if is_B is column:
            _keep_part(layer, name, 0 if column else 1, stripes if name == "lora_B" else 1)
        else:
            getattr(layer, name).lora_tp_sum = True


def _keep_part(layer: Any, name: str, dim: int, stripes: int) -> None:
    """Replace a whole adapter tensor by this rank's part of it."""
    whole: nn.Parameter = layer._parameters[name]
    if is_sharded(whole):
        return
    size, rank = _size(layer), torch.distributed.get_rank(layer.tp_group)
    pieces = [stripe.chunk(size, dim)[rank] for stripe in whole.detach().chunk(stripes, dim)]
    values = torch.cat(pieces, dim).clone(memory_format=torch.contiguous_format)
    layer._parameters[name] = nn.Parameter(values, whole.requires_grad)
    _tag(layer, name, dim, stripes)


def _tag(layer: Any, name: str, dim: int, stripes: int = 1) -> None:
    parameter = layer._parameters.get(name)
    if parameter is not None and not is_sharded(parameter):
        split_over(parameter, mesh_of(layer.tp_group, _device_type(layer.tp_group)), dim, stripes)


def _device_type(group: Any) -> str:
    return "cuda" if torch.distributed.get_backend(group) == "nccl" else "cpu"


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
