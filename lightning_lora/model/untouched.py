"""Refuse models that hold adapters already, were split over ranks, or have parameters without a size."""

import sys

from torch import nn

from lightning_lora.layers import LoRALayer
from lightning_lora.layers.split import SplitLinear
from lightning_lora.model.state import injection_of


def check_untouched(model: nn.Module) -> None:
    """Raise ``ValueError`` for a model that is adapted already, split over ranks, or has parameters without a size."""
    peft_layers = sys.modules.get("peft.tuners.tuners_utils")
    theirs = () if peft_layers is None else (peft_layers.BaseTuner, peft_layers.BaseTunerLayer)
    for name, module in model.named_modules():
        for local, parameter in module._parameters.items():
            if nn.parameter.is_lazy(parameter):
                lazy = f"{name}.{local}"
                raise ValueError(f"{lazy!r} has no size yet (a lazy module): run one batch through the model first")
        if isinstance(module, SplitLinear):
            raise ValueError(
                f"{name!r} was split over ranks by a former run under 'megatron_lora', and an adapter would be put in "
                "whole: build the model anew"
            )
        if isinstance(module, LoRALayer) or injection_of(module) is not None:
            raise ValueError(
                f"{name or type(model).__name__!r} is already adapted, as part of another model: call remove on "
                "it first"
            )
        if isinstance(module, theirs):
            raise ValueError(
                f"{type(model).__name__} is already wrapped by PEFT (at {name or 'the top'!r}): pass the base model, "
                "peft_model.unload(); adapters that PEFT saved are read by load_peft(model, directory)"
            )
