"""Make a block recompute its activations in backward, run compiled, or both, in place."""

import functools
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from typing_extensions import override

from lightning_lora.layers.class_swap import SwappedModule, swap_class


class Block(SwappedModule):
    """Mixin for a block that recomputes its activations in backward, or runs compiled, or both.

    Attributes:
        lora_checkpoint: keep only the block's inputs for backward.
        lora_backend: ``torch.compile`` the block's forward with this backend; equal blocks share the compiled code.
    """

    class_prefix: ClassVar[str] = ""
    base_attribute: ClassVar[str] = "block_base_class"  # the block may be a module whose class was swapped before

    block_base_class: ClassVar[type[nn.Module]]
    lora_checkpoint: bool
    lora_backend: str | None

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        run: Any = self.block_base_class.forward
        if self.lora_backend is not None:
            run = _compiled(run, self.lora_backend)
        if not self.lora_checkpoint or not torch.is_grad_enabled():
            return run(self, *args, **kwargs)
        # a key-value cache would be filled a second time by the recomputation
        kwargs = {name: _without_cache(name, value) for name, value in kwargs.items()}
        return checkpoint(functools.partial(run, self), *args, use_reentrant=False, **kwargs)


def wrap_blocks(blocks: Sequence[nn.Module], *, activation_checkpointing: bool, backend: str | None) -> None:
    """Make blocks recompute their activations or run compiled, in place. Names and parameters stay as they are."""
    if not activation_checkpointing and backend is None:
        return
    for block in blocks:
        if not isinstance(block, Block):
            swap_class(block, Block)
        block.__dict__.update(lora_checkpoint=activation_checkpointing, lora_backend=backend)


_CACHES = ("past_key_value", "past_key_values", "layer_past", "cache_params", "past_key_value_states")


def _without_cache(name: str, value: Any) -> Any:
    if name in _CACHES:
        return None
    return False if name == "use_cache" else value


@functools.cache
def _compiled(forward: Any, backend: str) -> Any:
    return torch.compile(forward, backend=backend)
