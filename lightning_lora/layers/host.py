"""Adapters with names: several of them on one layer, their *host*.

The host keeps its place, its tensors and its name in the model, and its class is swapped. Each adapter is an ordinary
:class:`~lightning_lora.layers.base.LoRALayer` below it, ``q_proj.lora.law``, that holds its own tensors alone and reads
all of the base through its host. So every kind of layer works under a name by its own code.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from typing_extensions import override

from lightning_lora.layers.acting import Choice, Mixture, Part
from lightning_lora.layers.base import LoRALayer
from lightning_lora.layers.class_swap import SwappedModule, restore_class, swap_class
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

    class_prefix: ClassVar[str] = "Hosted"
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


class AdaptersByName(nn.Module):
    """The child ``lora`` of a host: its adapters, by name."""


class Host(SwappedModule):
    """Mixin of a layer with named adapters: the base, one adapter or a mixture acts, as its choice says."""

    lora: AdaptersByName
    lora_choice: Choice  # the one object of all hosts in the model
    lora_stored: StoredForm | None  # how the base weight is read where it is no plain tensor

    @property
    def adapters(self) -> dict[str, LoRALayer]:
        """The adapters of this layer, by name."""
        return self.lora._modules  # type: ignore[return-value]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        acting = self.lora_choice.acting
        if isinstance(acting, Mixture):
            return self.mixed(acting, args, kwargs)
        return self.run_alone(acting, args, kwargs)

    def run_alone(self, name: str | None, args: Any, kwargs: Any) -> Any:
        """Run the layer with one adapter on all rows, or as its base if it has none of this name."""
        adapter = None if name is None else self.adapters.get(name)
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
        first = next((one for one in (*args, *kwargs.values()) if isinstance(one, Tensor)), None)
        if first is None:
            raise ValueError(f"a {type(self).__name__} got no tensor whose rows could be told apart by their adapters")
        skipped = 1 if mixture.is_packed and first.ndim > 1 and first.shape[0] == 1 else 0  # a batch of one
        shape = first.shape[: skipped + 1]
        parts = mixture.parts(shape, first.device)

        def of(part: Part) -> Callable[[Any], Any]:
            return lambda one: _rows_of(one, part, skipped, shape) if isinstance(one, Tensor) else one

        outputs = []
        for part in parts:
            with self.lora_choice.only(part.name):
                own_args, own_kwargs = tree_map(of(part), (args, kwargs))
                outputs.append(self.run_alone(part.name, own_args, own_kwargs))
        return tree_map(lambda *ones: _joined(ones, parts, skipped), *outputs)


def _rows_of(tensor: Tensor, part: Part, dim: int, shape: torch.Size) -> Tensor:
    if tensor.shape[: dim + 1] != shape:
        raise ValueError(
            f"a layer got tensors with {list(shape)} and {list(tensor.shape)} as leading dimensions, which cannot be "
            "told apart by rows: run its adapters one at a time"
        )
    if isinstance(part.rows, slice):
        return tensor.narrow(dim, part.rows.start, part.rows.stop - part.rows.start)
    return tensor.index_select(dim, part.rows)


def _joined(outputs: Any, parts: list[Part], dim: int) -> Any:
    if not isinstance(outputs[0], Tensor):
        return outputs[0]
    if len(parts) == 1:
        return outputs[0]
    total = torch.cat(outputs, dim)
    if all(isinstance(part.rows, slice) for part in parts):
        return total  # in order: each has one run
    order = torch.cat([_index(part, total.device) for part in parts])
    return total.index_select(dim, order.argsort())


def _index(part: Part, device: torch.device) -> Tensor:
    if isinstance(part.rows, Tensor):
        return part.rows
    return torch.arange(part.rows.start, part.rows.stop, device=device)


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


def release_host(host: Host) -> None:
    """Give a host its base class back, without its adapters."""
    del host._modules["lora"]
    for name in [name for name in host.__dict__ if name.startswith("lora_")]:
        del host.__dict__[name]
    restore_class(host)
