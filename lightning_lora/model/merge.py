"""Merge adapters into the base weights and take them out again; switch adapters off for a while."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from lightning_lora.layers import LoRALayer
from lightning_lora.model.inject import take_out
from lightning_lora.model.mergeable import check_mergeable
from lightning_lora.model.side_effects import trained_with_originals
from lightning_lora.model.spread import gathered, reshard
from lightning_lora.model.state import is_merged, named_lora_layers, require_roots
from lightning_lora.model.wrapping import keep_state_of_forward, switch_off, switch_on, switched
from lightning_lora.ops.sharded import is_sharded, local_part, write


def merge(model: nn.Module, remove: bool = False) -> nn.Module:
    """Add every adapter to its base weight in place: ``W += scaling * B A`` (Hu et al. 2021, sec. 4.1).

    The sum is taken in float32 or wider and rounded once to the weight's dtype. The weights as they were are kept on
    CPU, one copy of every adapted weight, so that :func:`unmerge` gives them back bit for bit. A merged model is the
    base class's own code, at its speed. Merging what is merged does nothing.

    A sharded base is gathered one layer at a time, and each rank merges and keeps its own part: call on all ranks. The
    model stays in shards then, and cannot be saved as one: to write a merged model, ``save_peft``, and in one process
    ``merge(load_peft(base, directory), remove=True)``.

    Args:
        model: the adapted model, or a module around it.
        remove: take the adapters out for good and keep no copies: a plain model with the merged weights remains, in
            shards if it was. Heads and biases that trained keep their trained values, rounded once to the base's dtype;
            those that are in shards themselves stay in ``adapter_dtype``, and are cast where they are read.

    Raises:
        ValueError: a weight is tied to another layer, which would change too; a layer's own forward is such that a
            changed weight does not add the adapter's term; an adapter holds NaN or infinity. Nothing is changed then.
    """
    roots = require_roots(model)
    reshard(model)
    unmerged = [
        {name: layer for name, layer in named_lora_layers(root).items() if layer.lora_original is None}
        for root in roots.values()
    ]
    for layers in unmerged:
        check_mergeable(model, layers)
    originals: dict[int, Tensor] = {}
    for layers in unmerged:
        for layer in layers.values():
            _merge_layer(layer, originals)
    reshard(model)
    if remove:
        for root in roots.values():
            take_out(root)
    return model


def unmerge(model: nn.Module) -> nn.Module:
    """Give the base weights back, bit for bit, and make the adapters active. On an unmerged model it does nothing."""
    reshard(model)
    for root in require_roots(model).values():
        for layer in named_lora_layers(root).values():
            if layer.lora_original is not None:
                for name, original in layer.lora_original.items():
                    write(layer._parameters[name], original)  # type: ignore[arg-type]  # merged: it is stored
                layer.lora_original, layer.lora_active = None, True
    return model


@contextmanager
def merged(model: nn.Module) -> Iterator[nn.Module]:
    """Merge inside the ``with`` block, and leave the model after it as it was before."""
    unmerged = [root for root in require_roots(model).values() if not is_merged(root)]
    merge(model)
    try:
        yield model
    finally:
        for root in unmerged:
            unmerge(root)


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Make the model its base inside the ``with`` block: no adapters, and the first values of heads and biases.

    No tensor is written: graphs built before, inside or after the block keep what they were built from, and so does
    what activation checkpointing recomputes of them.
    """
    roots = require_roots(model)
    keep_state_of_forward()
    with ExitStack() as stack:
        for root in roots.values():
            if is_merged(root):
                unmerge(root)
                stack.callback(merge, root)
            if id(root) not in switched:
                stack.enter_context(_sharded_originals(root))
                switch_on(id(root), _AsBase(root))
                stack.callback(switch_off, id(root))
        yield model


class _AsBase:
    """The switch of :func:`disabled`: adapters off, first values in the place of heads and biases that train."""

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self.layers: list[LoRALayer] = []
        self.swapped: list[tuple[nn.Module, str, nn.Parameter]] = []

    def enter(self) -> None:
        """Disable the adapters, and put frozen parameters where the trained ones are, under every name of each."""
        first = {
            id(parameter): nn.Parameter(original.to(parameter.device, parameter.dtype), requires_grad=False)
            for parameter, original in trained_with_originals(self.root)
            if not is_sharded(parameter)
        }
        self.layers = [layer for layer in named_lora_layers(self.root).values() if layer.lora_active]
        self.swapped = [
            (module, name, parameter)
            for module in (self.root.modules() if first else ())
            for name, parameter in module._parameters.items()
            if parameter is not None and id(parameter) in first
        ]
        for module, name, parameter in self.swapped:
            module._parameters[name] = first[id(parameter)]
        for layer in self.layers:
            layer.lora_active = False

    def leave(self) -> None:
        """Put the trained parameters back and enable the adapters."""
        for module, name, parameter in self.swapped:
            module._parameters[name] = parameter
        for layer in self.layers:
            layer.lora_active = True

    def check_in_backward(self) -> None:
        """Raise ``RuntimeError`` where tensors in shards would have to be written."""
        if any(is_sharded(parameter) for parameter, _ in trained_with_originals(self.root)):
            raise RuntimeError(
                f"backward recomputes a part of {type(self.root).__name__}, and disabled(model) was entered or left "
                "after its forward. Heads and biases in shards cannot be switched in backward: call backward on the "
                "same side of disabled(model) as forward"
            )


def _merge_layer(layer: LoRALayer, originals: dict[int, Tensor]) -> None:
    """Merge one layer; ``originals`` holds the tensors merged so far, of which layers may share one."""
    kept: dict[str, Tensor] = {}
    stored = layer.base_tensors()
    with gathered(layer), torch.no_grad():
        merged_tensors = layer.merged_tensors()
    for name, weight in stored.items():
        assert weight is not None
        if id(weight) not in originals:
            originals[id(weight)] = local_part(weight.detach()).to("cpu", copy=True)
            write(weight, merged_tensors[name])
        kept[name] = originals[id(weight)]
    layer.lora_original, layer.lora_active = kept, False


@contextmanager
def _sharded_originals(root: nn.Module) -> Iterator[None]:
    """Write first values into trained parameters in shards, which cannot be swapped: FSDP2 holds the very tensors."""
    reshard(root)
    sharded = [(parameter, original) for parameter, original in trained_with_originals(root) if is_sharded(parameter)]
    present = [local_part(parameter.detach()).clone() for parameter, _ in sharded]
    try:
        for parameter, original in sharded:
            write(parameter, original)
        yield
    finally:
        if sharded:
            reshard(root)
        for (parameter, _), values in zip(sharded, present, strict=True):
            write(parameter, values)
