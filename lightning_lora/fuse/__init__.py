"""Adapted layers, and norms beside them, that are computed together: found in a model, and released again."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from torch import nn

from lightning_lora.fuse.experts import LoRAExperts, fuse_experts
from lightning_lora.fuse.gated_mlp import LoRAGatedMLP, fuse_gated_mlp
from lightning_lora.fuse.norms import LoRARMSNorm, fuse_norms
from lightning_lora.fuse.siblings import group_siblings
from lightning_lora.layers.class_swap import restore_class

FUSIONS: dict[str, Callable[[nn.Module], None]] = {
    "experts": fuse_experts,
    "siblings": group_siblings,
    "gated MLPs": fuse_gated_mlp,
    "norms": fuse_norms,
}


def fuse(root: nn.Module, fusions: Iterable[str] = tuple(FUSIONS)) -> None:
    """Let the adapted layers inside ``root`` be computed together where that gives the same numbers.

    Names, parameters and the classes that modules are instances of stay; what is not recognised stays as it is.
    """
    fusions = tuple(fusions)
    for module in list(root.modules()):
        for name in fusions:
            FUSIONS[name](module)


def unfused_forward(module: nn.Module) -> Callable[..., Any] | None:
    """Return the forward that a fused module would have with ``fuse=False``; ``None`` for other modules."""
    if isinstance(module, (LoRAGatedMLP, LoRARMSNorm, LoRAExperts)):
        return partial(module.lora_base_class.forward, module)
    return None


def release(module: nn.Module) -> None:
    """Undo what :func:`fuse` did to the class of one module."""
    if isinstance(module, LoRAGatedMLP):
        restore_class(module, "lora_form", "lora_activation")
    elif isinstance(module, LoRARMSNorm):
        restore_class(module, "lora_form", "lora_has_zeros", "lora_seen")
