"""The parameters of each named adapter: which they are, and whether they train."""

from torch import nn

from lightning_lora.layers.host import Host
from lightning_lora.model.state import require_roots


def owners(model: nn.Module) -> dict[int, str]:
    """Return the name of the adapter that each parameter belongs to, by the parameter's identity; others are left out.

    In a model without named adapters it is empty.
    """
    return {
        id(parameter): name
        for host in model.modules()
        if isinstance(host, Host)
        for name, layer in host.adapters.items()
        for parameter in layer.parameters()
    }


def freeze(model: nn.Module, adapter: str) -> None:
    """Stop training a named adapter: its values and moments stay as they are, and other adapters go on.

    Its rows may stay in the batches. Its gradients are dropped.

    Raises:
        ValueError: the model has no adapter of this name.
    """
    require_roots(model)
    own = owners(model)
    if adapter not in own.values():
        raise ValueError(f"there is no adapter {adapter!r}: the model has {', '.join(sorted(set(own.values())))}")
    for parameter in model.parameters():
        if own.get(id(parameter)) == adapter:
            parameter.requires_grad_(False)
            parameter.grad = None
