"""Lightning's ``BitsandbytesPrecision`` replaces linear layers: let it replace the base's, under the adapters.

Its ``convert_module`` puts a new layer in the place of every ``nn.Linear``, adapted ones too, whose adapters would be
lost. So it is called while the adapters are out. Where a layer of bitsandbytes is there already, it replaces nothing.
"""

import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.compat.lightning import connectors
from lightning_lora.layers.plain_weight import is_bitsandbytes
from lightning_lora.model.inject import inject_anew, take_out
from lightning_lora.model.names import joined
from lightning_lora.model.state import (
    Injection,
    injected_roots,
    named_lora_layers,
    named_trained_whole,
    require_injection,
)
from lightning_lora.model.wrapping import at_injection, wrap

INSTEAD = (
    "lightning_lora quantises the frozen base by itself, on any device, in shards too: leave the plugin out and write "
    'LoRACallback(quantize="nf4"), or inject(model, config, quantize="nf4"); "nf4-dq" and "int8" are the other words'
)


def replaces_linears(precision: Any) -> bool:
    """Whether a precision plugin is Lightning's for bitsandbytes, of the Trainer or of Fabric."""
    return any(cls.__name__ == "BitsandbytesPrecision" for cls in type(precision).__mro__)


def check_precision(strategy: Any, precision: Any) -> None:
    """Raise ``ValueError`` for the plugin under a strategy that spreads the base over ranks."""
    if replaces_linears(precision) and getattr(strategy, "shards", False):
        raise ValueError(f"{type(strategy).__name__} cannot shard the layers of BitsandbytesPrecision. {INSTEAD}")


def convert_under_adapters(precision: Any, module: nn.Module) -> None:
    """Let the plugin replace the linear layers of an adapted module's base; the adapters stay the same parameters.

    Modules that train whole are left out of it. Nothing is done for other plugins, or a second time.
    """
    roots = injected_roots(module)
    if not replaces_linears(precision) or not roots or any(map(is_bitsandbytes, module.modules())):
        return
    taken = [(root, _TakenOut(root)) for root in roots.values()]
    heads = {joined(path, name) for path, root in roots.items() for name in require_injection(root).trained_whole}
    for root in roots.values():
        take_out(root)
    former, precision.ignore_modules = precision.ignore_modules, precision.ignore_modules | heads
    try:
        precision.convert_module(module)
    finally:
        precision.ignore_modules = former
        for root, adapters in taken:
            adapters.put_back(root)


class _TakenOut:
    """The adapters of a root, and what else trains in it, to be put back over other base layers."""

    def __init__(self, root: nn.Module) -> None:
        layers = named_lora_layers(root)
        self.injection: Injection = require_injection(root)
        self.adapters = {name: dict(layer.named_adapter_tensors()) for name, layer in layers.items()}
        self.modes = {name: (layer.drops, layer.lora_salt) for name, layer in layers.items()}
        self.whole: dict[str, Tensor] = {n: p.detach().clone() for n, p in named_trained_whole(root).items()}

    def put_back(self, root: nn.Module) -> None:
        with torch.random.fork_rng():  # what is drawn is dropped
            inject_anew(root, self.injection.config, check_ranks=False)
        for name, layer in named_lora_layers(root).items():
            layer._parameters.update(self.adapters[name])
            drops, layer.lora_salt = self.modes[name]
            if "lora_mode" in layer._modules:
                layer.lora_mode.train(drops)  # type: ignore[union-attr]  # a module
        for name, parameter in named_trained_whole(root).items():
            parameter.data.copy_(self.whole[name])
        kept = ("originals", "source", "base_weights", "fingerprint")
        own = {name: getattr(self.injection, name) for name in kept}
        root.lora_injection = dataclasses.replace(require_injection(root), **own)  # type: ignore[assignment]


@at_injection
def wrap_connectors() -> None:
    """Let the errors by which Lightning refuses the plugin (CPU, FSDP) say what to write instead."""
    for connector in connectors():
        wrap(connector, "__init__", _saying)


def _saying(init: Any) -> Any:
    @functools.wraps(init)
    def saying(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            init(self, *args, **kwargs)
        except (RuntimeError, TypeError) as error:
            if "itsandbytes" not in str(error):
                raise
            raise type(error)(f"{error} {INSTEAD}") from error

    return saying
