"""Make ``save_pretrained`` of an adapted model write what ``from_pretrained`` reads, or raise an error.

It writes what ``state_dict()`` holds, and its readers drop names that the class does not know: those of the adapters.
"""

import functools
import inspect
import sys
from collections.abc import Mapping
from typing import Any

from torch import nn

from lightning_lora.layers import LoRALayer
from lightning_lora.model.copies import WHAT_TO_WRITE
from lightning_lora.model.gathered import class_name
from lightning_lora.model.names import clean_name
from lightning_lora.model.wrapping import at_injection, wrap
from lightning_lora.ops.sharded import is_part

# the classes that models inherit the method from, by the modules that define them
_WRITERS = {
    "transformers.modeling_utils": "PreTrainedModel",
    "diffusers.models.modeling_utils": "ModelMixin",
    "huggingface_hub.hub_mixin": "ModelHubMixin",
}


@at_injection
def guard_save_pretrained() -> None:
    """Wrap ``save_pretrained`` of imported model classes so that it looks for adapters. A second call does nothing.

    While the adapters are merged or disabled, the model is written as it computes; without their tensors, if the method
    takes ``state_dict=``. While they are active, and of a model that is spread over ranks, it is an error that says
    what to write instead. A model without adapters, and a ``state_dict=`` without any, is written as ever.
    """
    for module, name in _WRITERS.items():
        if (cls := getattr(sys.modules.get(module), name, None)) is not None:
            wrap(cls, "save_pretrained", _looking_for_adapters)


def _looking_for_adapters(method: Any) -> Any:
    signature = inspect.signature(method)

    @functools.wraps(method)
    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self, nn.Module):
            call = signature.bind(self, *args, **kwargs)
            state = _without_adapters(self, call.arguments.get("state_dict"))
            if state is not None and "state_dict" in signature.parameters:
                call.arguments["state_dict"] = state
                return method(*call.args, **call.kwargs)
        return method(self, *args, **kwargs)

    return save_pretrained


def _without_adapters(model: nn.Module, state: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return what to write of ``state``, or of the model's own; ``None`` if that holds no adapters.

    Raises:
        ValueError: the adapters are active, or the model is spread over ranks.
    """
    if state is None and any(is_part(parameter) for parameter in model.parameters()):
        raise ValueError(
            f"save_pretrained would write this rank's parts of {class_name(model)}, which is spread over ranks. "
            + WHAT_TO_WRITE
        )
    layers = {name: m for name, m in model.named_modules(remove_duplicate=False) if isinstance(m, LoRALayer)}
    adapters = {clean_name(f"{name}.{local}") for name, layer in layers.items() for local in layer.tensor_names}
    state = model.state_dict() if state is None and layers else state or {}
    kept = {name: value for name, value in state.items() if clean_name(name) not in adapters}
    if len(kept) == len(state):
        return None
    if any(layer.lora_active for layer in layers.values()):
        raise ValueError(
            f"save_pretrained would write the adapters of {class_name(model)} under names that from_pretrained drops, "
            "and the base alone would be read back. To write the adapter, call save_peft(model, directory). To write "
            "the merged model, call model.save_pretrained(directory) inside `with merged(model):`, or after "
            "merge(model, remove=True)"
        )
    return kept
