"""Choose the class that adapts a layer: by its type, by how its model uses it, and by what the config asks for."""

from collections.abc import Mapping

import torch
from torch import nn

from lightning_lora.config import LoRAConfig
from lightning_lora.layers import LoRALayer, mixin_for, read_mixin, with_options
from lightning_lora.layers.read_weight import check_rescaled, reader_of
from lightning_lora.layers.registry import RESIDUAL


def choose_mixin(modules: Mapping[str, nn.Module], name: str, config: LoRAConfig) -> type[LoRALayer]:
    """Return the mixin for the layer called ``name``.

    Raises:
        ValueError: a layer of its kind, or in its place, cannot be adapted as ``config`` asks.
    """
    layer = modules[name]
    mixin = mixin_for(layer)
    assert mixin is not None
    mixin.check_use(modules, name, config)
    check_rescaled(modules, name)
    reader = reader_of(modules, name)
    if reader is not None:
        try:
            mixin = read_mixin(mixin, layer, reader)
        except ValueError as error:
            raise ValueError(f"{name!r} cannot be adapted: {error}") from None
    try:
        mixin = with_options(mixin, layer, use_dora=config.use_dora, lora_bias=config.lora_bias)
    except ValueError as error:
        option = "use_dora" if config.use_dora else "lora_bias"
        raise ValueError(
            f"{name!r} cannot be adapted with {option}=True: {error}. Leave the layer out with exclude_modules, or "
            f"give {option}=False"
        ) from None
    if not config.starts_from_base or not mixin.uses_init:
        return mixin
    return _starting_from_base(mixin, name, layer, config)


def _starting_from_base(mixin: type[LoRALayer], name: str, layer: nn.Module, config: LoRAConfig) -> type[LoRALayer]:
    """Return the counterpart of ``mixin`` that subtracts its start in the product, after checking the weight."""
    residual = RESIDUAL.get(mixin)
    weight = layer._parameters.get("weight")
    if residual is None or weight is None or weight.device.type == "meta" or not weight.is_floating_point():
        why = "its weight is on the meta device" if weight is not None and weight.is_meta else type(layer).__name__
        raise ValueError(
            f"init={config.init!r} starts from the weights of linear layers, and {name!r} has none to start from "
            f"({why}): load the base first, or leave the layer out with exclude_modules"
        )
    if not torch.isfinite(weight).all():
        raise ValueError(
            f"init={config.init!r} starts from the weight of {name!r}, which holds NaN or infinity: load another base, "
            "or take init='kaiming'"
        )
    return residual
