"""Turn a layer into a :class:`~lightning_lora.layers.base.LoRALayer` in place, and back.

Its class is swapped for a made class ``LoRA<Base>(mixin, Base)``. It gains the parameters ``lora_A`` and ``lora_B``,
and with dropout an empty module ``lora_mode``; names, hooks, ties and tensors of the base do not change.
"""

from typing import Any, TypeVar

import torch
from torch import nn

from lightning_lora.layers.base import LoRALayer
from lightning_lora.layers.class_swap import restore_class, swap_class
from lightning_lora.layers.stored import stored_form

L = TypeVar("L", bound=LoRALayer)


class AdapterMode(nn.Module):
    """Hold the mode of one adapter's dropout, where ``train()``, ``eval()`` and Lightning's validation find it."""


def adapt(
    layer: nn.Module, mixin: type[LoRALayer], *, r: int, scaling: float, dropout: float, dtype: torch.dtype | None
) -> LoRALayer:
    """Turn ``layer`` into a :class:`LoRALayer` in place, with all-zero A and B.

    The parameters are real also where the base is on the meta device: they are then on CPU.
    """
    shape_A, shape_B = mixin.shapes(layer, r)
    more_shapes = mixin.more_shapes(layer, r)
    adapted = become_lora_layer(layer, mixin, scaling=scaling, dropout=dropout, dtype=dtype)
    like: Any = None if adapted.lora_stored is None else adapted.lora_stored.read(adapted)
    like = layer._parameters.get(mixin.base_name) if like is None else like
    like = getattr(layer, mixin.base_name, None) if like is None else like
    register_factors(adapted, like, lora_A=shape_A, lora_B=shape_B, **more_shapes)
    return adapted


def become_lora_layer(
    layer: nn.Module, mixin: type[L], *, scaling: float, dropout: float, dtype: torch.dtype | None, **attributes: Any
) -> L:
    """Give ``layer`` the made class, the plain attributes of a :class:`LoRALayer` and ``attributes``; return it."""
    stored = stored_form(layer, mixin.base_name)
    swap_class(layer, mixin)
    # past nn.Module.__setattr__, which looks for parameters and modules among them
    layer.__dict__.update(lora_scaling=scaling, lora_dropout=dropout, lora_dtype=dtype)
    layer.__dict__.update(lora_active=True, lora_original=None, lora_salt=0, **attributes)
    if stored is not None:
        layer.__dict__.update(lora_stored=stored)
    if dropout > 0.0:
        layer.add_module("lora_mode", AdapterMode().train(layer.training))
    assert isinstance(layer, mixin)
    return layer


def register_factors(layer: LoRALayer, like: Any, **shapes: tuple[int, ...]) -> None:
    """Register all-zero adapter parameters of the given shapes, on the device of a weight that is not on meta."""
    device, dtype = getattr(like, "device", torch.device("meta")), getattr(like, "dtype", torch.float32)
    device = torch.device("cpu") if device.type == "meta" else device
    own = dtype if dtype.is_floating_point else torch.float32
    for name, shape in shapes.items():
        values = torch.zeros(shape, device=device, dtype=layer.lora_dtype or own)
        layer.register_parameter(name, nn.Parameter(values))


def unadapt(layer: LoRALayer) -> nn.Module:
    """Give the layer its base class back and drop the adapter. The base weight is left as it is."""
    for name in layer.tensor_names:
        del layer._parameters[name]
    for name in [name for name in layer.__dict__ if name.startswith("lora_")]:
        del layer.__dict__[name]
    for name in ("adapter_names", "frozen_names"):
        layer.__dict__.pop(name, None)
    layer._modules.pop("lora_mode", None)
    restore_class(layer)
    return layer
