"""Let ``load_state_dict`` of an adapted model take a base file, or an adapter file, alone."""

from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.compat.torch import remove_load_hook
from lightning_lora.layers import LoRALayer
from lightning_lora.layers.dora import DoRA
from lightning_lora.model.names import clean_name, joined
from lightning_lora.model.state import injection_of, is_merged, named_trained_whole
from lightning_lora.ops.weights import row_norms


def complete_state_dicts(root: nn.Module) -> None:
    """Let ``root.load_state_dict`` take the half of a state that a base or an adapter checkpoint holds."""
    root.register_load_state_dict_pre_hook(_complete_state_dict)


def take_state_dicts_as_they_are(root: nn.Module) -> None:
    """Undo :func:`complete_state_dicts`."""
    remove_load_hook(root, _complete_state_dict)


def _complete_state_dict(root: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Let a base checkpoint load without adapters, and an adapter checkpoint without the base.

    The missing half is filled in with the tensors that are there, only when all of it is missing: one absent adapter
    among others stays an error.
    """
    injection = injection_of(root)
    if injection is None:
        return
    if is_merged(root):
        raise ValueError("the adapters are merged into the weights: call unmerge(model) before loading a state into it")
    own = {f"{prefix}{name}": tensor for name, tensor in root.state_dict(keep_vars=True).items()}
    adapters = {
        prefix + joined(name, local)
        for name, layer in root.named_modules(remove_duplicate=False)
        if isinstance(layer, LoRALayer)
        for local in layer.tensor_names
    }
    whole = named_trained_whole(root)
    trained = {f"{prefix}{name}" for name, _ in root.named_parameters() if clean_name(name) in whole}
    base = own.keys() - adapters - trained
    first: dict[int, str] = {}  # of the names of one tensor; a file has the others or not
    for key, tensor in own.items():
        first.setdefault(id(tensor), key)
    if not any(key in state_dict for key in adapters):
        state_dict.update({key: own[key] for key in adapters})
        _restart_magnitudes(root, state_dict, prefix)
        for name in whole:
            value = state_dict.get(f"{prefix}{name}")
            if isinstance(value, Tensor):
                injection.originals[name] = value.detach().clone()
    elif all(first[id(own[key])] in state_dict for key in adapters) and not any(key in state_dict for key in base):
        for key in (base | adapters) - state_dict.keys():
            state_dict[key] = state_dict.get(first[id(own[key])], own[key])


@torch.no_grad()
def _restart_magnitudes(root: nn.Module, state_dict: dict[str, Any], prefix: str) -> None:
    """Let magnitudes that have not trained start at the norms of the base that a state dict brings."""
    for name, layer in root.named_modules():
        weight = state_dict.get(f"{prefix}{joined(name, 'weight')}")
        if not isinstance(layer, DoRA) or not isinstance(weight, Tensor) or not layer.is_at_start():
            continue
        matrix = layer.as_matrix(weight.to(layer.base_weight))
        norms = row_norms(matrix, *layer.factors(), layer.lora_scaling)
        state_dict[f"{prefix}{joined(name, 'lora_magnitude')}"] = norms.view_as(layer.lora_magnitude)
