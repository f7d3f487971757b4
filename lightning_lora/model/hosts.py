"""The hosts of named adapters in a model: found, made, looked past, and released."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from lightning_lora.fuse import fuse
from lightning_lora.layers import LoRALayer
from lightning_lora.layers.acting import Choice
from lightning_lora.layers.attention import LoRAMultiheadAttention
from lightning_lora.layers.class_swap import restore_class, swap_class
from lightning_lora.layers.host import Host, follow_base, make_host, release_host, seen_by_adapter
from lightning_lora.layers.linear import LoRALinear
from lightning_lora.layers.linear_host import LinearHost, ReadHost
from lightning_lora.layers.parameters import LoRAParameters
from lightning_lora.layers.read_weight import ReadWeight
from lightning_lora.model.names import clean_name
from lightning_lora.model.targets import has_redundant_forward


def named_hosts(root: nn.Module) -> dict[str, Host]:
    """Return the layers with named adapters, by their clean names."""
    return {clean_name(name): m for name, m in root.named_modules() if isinstance(m, Host)}


def host_for(layer: nn.Module, mixin: type[LoRALayer], choice: Choice) -> nn.Module:
    """Return the base layer as an adapter of kind ``mixin`` sees it, once the layer is a host, in place."""
    kind = LinearHost if issubclass(mixin, LoRALinear) else Host
    kind = ReadHost if issubclass(mixin, (ReadWeight, LoRAMultiheadAttention, LoRAParameters)) else kind
    if not isinstance(layer, Host):
        if has_redundant_forward(layer):
            del layer.__dict__["forward"]
        layer = make_host(layer, kind, choice)
    elif kind is ReadHost and not isinstance(layer, ReadHost):
        restore_class(layer)
        swap_class(layer, ReadHost)
    return seen_by_adapter(layer)


def put_adapter(host: Host, name: str, adapter: LoRALayer) -> None:
    """Make an adapter a child of its host."""
    host.lora.add_module(name, adapter)
    note_read(host)


def drop_adapter(host: Host, name: str) -> None:
    """Take an adapter out of its host, which is released with its last one."""
    host.adapters.pop(name, None)
    if host.adapters:
        note_read(host)
    else:
        release_host(host)


def fuse_anew(root: nn.Module) -> None:
    """Fuse the layers of a model with the adapters that they have at present."""
    for host in named_hosts(root).values():
        host.__dict__.pop("lora_siblings", None)
        for layer in host.adapters.values():
            layer.__dict__.pop("lora_siblings", None)
    fuse(root)


def follow_bases(root: nn.Module) -> None:
    """Let all adapters see the classes that their bases have since."""
    for host in named_hosts(root).values():
        follow_base(host)


def note_read(host: Host) -> None:
    """Let a host give what its acting adapter makes of the tensors that other code reads."""
    if isinstance(host, ReadHost):
        host.__dict__["lora_read"] = frozenset().union(*map(_read_names, host.adapters.values()))


def _read_names(layer: LoRALayer) -> frozenset[str]:
    if isinstance(layer, LoRAParameters):
        return frozenset(layer.lora_parts)
    return frozenset([layer.base_name] if isinstance(layer, (ReadWeight, LoRAMultiheadAttention)) else [])


@contextmanager
def looked_past(root: nn.Module) -> Iterator[None]:
    """Let a model with named adapters be its base inside the block, to plan another adapter."""
    hosts = [(host, type(host), host._modules.pop("lora")) for host in named_hosts(root).values()]
    injection = root.__dict__.pop("lora_injection", None)
    for host, _, _ in hosts:
        host.__class__ = host.lora_base_class  # type: ignore[assignment]
    try:
        yield
    finally:
        for host, cls, adapters in hosts:
            host.__class__ = cls
            host._modules["lora"] = adapters
        if injection is not None:
            root.__dict__["lora_injection"] = injection
