"""What is computed together, found in a whole model: siblings, gated MLPs, norms, experts."""

from typing import Any

from torch import nn

from lightning_lora.fuse.experts import fuse_experts
from lightning_lora.fuse.gated_mlp import LoRAGatedMLP, fuse_gated_mlp, release_gated_mlp
from lightning_lora.fuse.norms import LoRARMSNorm, fuse_norms, release_norm
from lightning_lora.fuse.siblings import group_siblings


def fuse(root: nn.Module) -> None:
    """Let the adapted layers inside ``root`` be computed together where that gives the same numbers.

    Names, parameters and classes' ancestry stay; what is not recognised stays as it is.
    """
    known: dict[Any, Any] = {}
    for module in list(root.modules()):
        fuse_experts(module, known)
        if module._modules:
            group_siblings(module)
            fuse_gated_mlp(module, known)
            fuse_norms(module, known)


def release(module: nn.Module) -> None:
    """Undo what :func:`fuse` did to the class of one module."""
    if isinstance(module, LoRAGatedMLP):
        release_gated_mlp(module)
    elif isinstance(module, LoRARMSNorm):
        release_norm(module)
