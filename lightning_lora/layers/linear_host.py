"""Linear layers with named adapters: in a mixture the base's product runs once, over the rows of all adapters."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_lora.layers.acting import Mixture, Undecided
from lightning_lora.layers.host import Host
from lightning_lora.layers.linear import LoRAConv1D, LoRALinear, is_plain
from lightning_lora.layers.masked import masked_linears
from lightning_lora.layers.split import SplitLinear, enter, leave
from lightning_lora.ops.linear import lora_linears
from lightning_lora.ops.linear_tensors import LinearTensors, StoredLinearTensors
from lightning_lora.ops.mixture import Share, Shares
from lightning_lora.ops.stored import stored_linear


class LinearHost(Host):
    """Host of a linear layer, or a Conv1D."""

    weight: Tensor
    bias: Tensor | None
    lora_siblings: Any = None  # fuse/mixed.py: the group of hosts that are computed with this one in a mixture
    lora_place: int  # in that group

    @override
    def base_forward(self, *args: Any, **kwargs: Any) -> Any:
        stored = None if self.lora_stored is None else self.lora_stored.product(self, args[0])
        if stored is not None and not isinstance(self, SplitLinear):  # which enters and leaves
            return stored_linear(args[0], stored, self.bias)
        return super().base_forward(*args, **kwargs)

    @override
    def mixed(self, mixture: Mixture, args: Any, kwargs: Any) -> Any:
        if mixture.exact or len(args) != 1 or kwargs or not self.is_product(args[0]):
            return super().mixed(mixture, args, kwargs)
        y: Tensor | None = None if self.lora_siblings is None else self.lora_siblings.output(self, args[0])
        if y is None:
            x = enter(self, args[0])
            y = leave(self, compute_together([self], mixture, x)[0])
        return y

    @property
    def drops(self) -> bool:
        """Whether the dropout of any adapter is on."""
        return any(layer.drops for layer in self.adapters.values())

    def is_product(self, x: Tensor) -> bool:
        """Return True if the layer is ``x W^T + b`` and every adapter adds ``scaling * B A``."""
        for layer in self.adapters.values():
            if not (isinstance(layer, LoRALinear) and (is_plain(layer) or type(layer).__bases__[0] is LoRAConv1D)):
                return False
        return self.lora_stored is None or self.lora_stored.product(self, x) is not None

    def base_tensors(self, x: Tensor) -> LinearTensors:
        """Return the tensors of the base's product, without factors."""
        bias = self.local_bias() if isinstance(self, SplitLinear) else self.bias
        if self.lora_stored is not None:
            return StoredLinearTensors(self.lora_stored.product(self, x), bias, None, None)
        weight = self._parameters["weight"]
        assert weight is not None
        adapter = next(iter(self.adapters.values()))
        return LinearTensors(adapter.as_matrix(weight), bias, None, None)


def compute_together(hosts: Sequence[LinearHost], mixture: Mixture, x: Tensor) -> Sequence[Tensor]:
    """Return what the products of hosts give for ``x`` ``[..., in_features]``, what this rank multiplies."""
    if not torch.compiler.is_compiling():
        return lora_linears(x, *mixed_linears(hosts, mixture, x))
    choice = hosts[0].lora_choice
    adapters = {name: _layers_of(name, hosts) for name in choice.names}
    return masked_linears([host.base_tensors(x) for host in hosts], adapters, choice, mixture, x)


def mixed_linears(hosts: Sequence[LinearHost], mixture: Mixture, x: Tensor) -> tuple[list[LinearTensors], Shares]:
    """Return what :func:`lora_linears` takes for hosts that read one input, of which each row has its own adapter.

    Args:
        x: ``[..., in_features]``, what this rank multiplies.
    """
    tensors = [host.base_tensors(x) for host in hosts]
    kind = type(tensors[0])
    shares: list[Share] = []
    seeds: list[Tensor | None] = []
    for part in mixture.parts(x.shape[:-1], x.device):
        own = _layers_of(part.name, hosts)
        for places in _alike(own):
            settings = own[places[0]].scaled_dropout_of(own[place] for place in places)
            shares.append(Share(part.rows, places, settings._replace(seed=None), settings.seed is not None))
            seeds.append(settings.seed)
            tensors += [kind(None, None, own[place].lora_A, own[place].lora_B) for place in places]
    drops = any(seed is not None for seed in seeds)
    seed = torch.stack([torch.zeros((), dtype=torch.int64) if s is None else s for s in seeds]) if drops else None
    return tensors, Shares(tuple(shares), len(hosts), seed)


def _layers_of(name: str | None, hosts: Sequence[LinearHost]) -> dict[int, Any]:
    """Return the layers of one adapter by the places of their hosts."""
    found = {} if name is None else {place: host.adapters.get(name) for place, host in enumerate(hosts)}
    return {place: layer for place, layer in found.items() if layer is not None and layer.lora_active}


def _alike(layers: dict[int, Any]) -> list[tuple[int, ...]]:
    """Return the places of layers that share scaling and dropout, and so one input of their own."""
    found: dict[Any, list[int]] = {}
    for place, layer in layers.items():
        found.setdefault((layer.lora_scaling, layer.lora_dropout, layer.drops, layer.lora_A.dtype), []).append(place)
    return [tuple(places) for places in found.values()]


class ReadHost(LinearHost):
    """Host of a layer whose adapted tensors are read by its own code, or by a module around it.

    Reading one gives what the adapter that acts makes of it.
    """

    lora_read: frozenset[str]  # the names of these tensors

    def __getattr__(self, name: str) -> Any:
        value: Any = super().__getattr__(name)
        if name not in self.__dict__.get("lora_read", ()) or isinstance(self.lora_choice.chosen, Undecided):
            return value
        acting = self.lora_choice.acting
        if isinstance(acting, Mixture):
            raise ValueError(
                f"the {name} of a {self.lora_base_class.__name__} is read by the code around it, and cannot be of "
                "several adapters at once: run one adapter at a time, or leave the layer out with exclude_modules"
            )
        adapter = None if acting is None else self.adapters.get(acting)
        return value if adapter is None else getattr(adapter, name)
