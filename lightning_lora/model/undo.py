"""Restore a model when an error interrupts a change."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

# the attributes in which nn.Module keeps children, tensors and hooks
_CONTAINERS = tuple(name for name, value in nn.Module().__dict__.items() if isinstance(value, (dict, set)))


@contextmanager
def unchanged_on_error(model: nn.Module) -> Iterator[None]:
    """Give every module its class, attributes, parameters and hooks back if the block raises.

    Parameters may be replaced, frozen and converted inside the block, not written to: no tensor is copied. The default
    random generator gets its state back too.
    """
    modules = [(module, type(module), dict(module.__dict__)) for module in model.modules()]
    containers = [module.__dict__[name] for module, *_ in modules for name in _CONTAINERS if name in module.__dict__]
    contents = [(container, container.copy()) for container in containers]
    parameters = [(parameter, parameter.requires_grad, parameter.data) for parameter in model.parameters()]
    generator = torch.get_rng_state()
    try:
        yield
    except BaseException:
        for module, cls, attributes in modules:
            module.__class__ = cls
            module.__dict__.clear()
            module.__dict__.update(attributes)
        for container, former in contents:
            container.clear()
            container.update(former)
        for parameter, requires_grad, data in parameters:
            if parameter.dtype != data.dtype:
                parameter.data = data
            parameter.requires_grad_(requires_grad)
        torch.set_rng_state(generator)
        raise
