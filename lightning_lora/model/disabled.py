"""Switch adapters off for a while: the model is its base inside ``with disabled(model)``."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import nn

from lightning_lora.layers import LoRALayer
from lightning_lora.layers.acting import UNDECIDED, Acting, Undecided
from lightning_lora.model.merge import merge_again, unmerge
from lightning_lora.model.side_effects import trained_with_originals
from lightning_lora.model.spread import reshard
from lightning_lora.model.state import is_merged, named_lora_layers, require_injection, require_roots
from lightning_lora.model.wrapping import keep_state_of_forward, switch_off, switch_on, switched
from lightning_lora.ops.sharded import is_sharded, local_part, write


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
                how = require_injection(root).merged
                unmerge(root)
                stack.callback(merge_again, root, how)
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
        self.chosen: Acting | Undecided = UNDECIDED

    def enter(self) -> None:
        """Disable the adapters, and put frozen parameters where the trained ones are, under every name of each."""
        choice = require_injection(self.root).choice
        self.chosen = choice.chosen
        if choice.chosen is UNDECIDED:
            choice.chosen = None
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
        require_injection(self.root).choice.chosen = self.chosen
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
