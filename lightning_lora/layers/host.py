"""Adapters with names: several of them on one layer, their *host*.

The host keeps its place, its tensors and its name in the model, and its class is swapped. Each adapter is an ordinary
:class:`~lightning_lora.layers.base.LoRALayer` below it, ``q_proj.lora.law``, that holds its own tensors alone and reads
all of the base through its host. So every kind of layer works under a name by its own code.
"""

from typing import Any, ClassVar

from torch import nn
from typing_extensions import override

from lightning_lora.layers.acting import Choice, Mixture
from lightning_lora.layers.base import LoRALayer
from lightning_lora.layers.by_rows import run_by_rows
from lightning_lora.layers.class_swap import SwappedModule, lora_class, restore_class, swap_class
from lightning_lora.layers.stored import StoredForm, stored_form


class _OwnParameters(dict[str, Any]):
    """The parameters of one adapter. Those of its host are found by name, too, and are not listed."""

    def __init__(self, host: nn.Module) -> None:
        super().__init__()
        self.host = host

    @override
    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or name in self.host._parameters

    def __missing__(self, name: str) -> Any:
        return self.host._parameters[name]

    @override
    def get(self, name: str, default: Any = None) -> Any:
        own = super().get(name)
        return self.host._parameters.get(name, default) if own is None else own


class Hosted(SwappedModule):
    """Mixin of the base layer as an adapter sees it: it reads every tensor and attribute of its host."""

    class_prefix: ClassVar[str] = ""
    base_attribute: ClassVar[str] = "hosted_base_class"

    lora_host: "Host"

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            host = self.__dict__.get("lora_host")
            if host is None:  # while a copy is made
                raise
            return getattr(host, name)

    @override
    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        nn.Module._save_to_state_dict(self, *args, **kwargs)  # packed tensors are those of the host

    @override
    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        nn.Module._load_from_state_dict(self, *args, **kwargs)


class AdaptersByName(nn.Module):
    """The child ``lora`` of a host: its adapters, by name."""


class Host(SwappedModule):
    """Mixin of a layer with named adapters: the base, one adapter or a mixture acts, as its choice says."""

    lora: AdaptersByName
    lora_choice: Choice  # the one object of all hosts in the model
    lora_stored: StoredForm | None = None  # how the base weight is read where it is no plain tensor

    @property
    def adapters(self) -> dict[str, LoRALayer]:
        """The adapters of this layer, by name."""
        return self.lora._modules  # type: ignore[return-value]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        acting = self.lora_choice.acting
        if isinstance(acting, Mixture):
            return self.mixed(acting, args, kwargs)
        adapter = None if acting is None else self.adapters.get(acting)
        if adapter is None:
            return self.base_forward(*args, **kwargs)
        return adapter.forward(*args, **kwargs)

    def base_forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the base class's ``forward``."""
        return self.lora_base_class.forward(self, *args, **kwargs)

    def mixed(self, mixture: Mixture, args: Any, kwargs: Any) -> Any:
        """Run the layer on the rows of each adapter apart, and put the outputs together."""
        if not all(layer.can_mix for layer in self.adapters.values()):
            raise ValueError(
                f"a {self.lora_base_class.__name__} cannot tell the rows of several adapters apart: run one adapter at "
                "a time, or leave the layer out with exclude_modules"
            )
        row_dim = max(layer.row_dim for layer in self.adapters.values())
        return run_by_rows(self.lora_choice, mixture, self.forward, args, kwargs, row_dim)


def make_host(layer: nn.Module, mixin: type[Host], choice: Choice) -> Host:
    """Turn a base layer into a host without adapters, in place."""
    stored = stored_form(layer)
    swap_class(layer, mixin)
    assert isinstance(layer, Host)
    layer.__dict__.update(lora_choice=choice, lora_stored=stored)
    layer.add_module("lora", AdaptersByName().train(layer.training))
    return layer


def seen_by_adapter(host: Host) -> nn.Module:
    """Return a module that is the host's base layer to whoever reads it, for an adapter to be put on."""
    seen = nn.Module().train(host.training)
    seen.__dict__.update(lora_host=host, _parameters=_OwnParameters(host))
    swap_class(seen, Hosted, host.lora_base_class)
    return seen


def follow_base(host: Host, kind: type[LoRALayer] | None = None) -> None:
    """Let the adapters of a host see the class that its base has since, such as one with a plain weight.

    Args:
        kind: what the adapters become; ``None`` keeps what they are.
    """
    for adapter in host.adapters.values():
        mixin = kind or type(adapter).__bases__[0]
        adapter.__class__ = lora_class(mixin, lora_class(Hosted, host.lora_base_class))
        adapter.__dict__.pop("lora_stored", None)
        if host.lora_stored is not None:
            adapter.__dict__["lora_stored"] = host.lora_stored


def adapters_of(layer: nn.Module) -> list[LoRALayer]:
    """Return the adapters of a layer: those with names, or itself."""
    if isinstance(layer, Host):
        return list(layer.adapters.values())
    return [layer] if isinstance(layer, LoRALayer) else []


def release_host(host: Host) -> None:
    """Give a host its base class back, without its adapters."""
    del host._modules["lora"]
    for name in [name for name in host.__dict__ if name.startswith("lora_")]:
        del host.__dict__[name]
    restore_class(host)
