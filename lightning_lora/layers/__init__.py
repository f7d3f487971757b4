"""Adapted layers: one file per kind of base layer, a registry that picks by type."""

from lightning_lora.layers.adapt import adapt, unadapt
from lightning_lora.layers.base import LoRALayer, Pair
from lightning_lora.layers.registry import is_linear, mixin_for, read_mixin, register, with_options
from lightning_lora.layers.stored import register_stored_weight

__all__ = [
    "LoRALayer",
    "Pair",
    "adapt",
    "is_linear",
    "mixin_for",
    "read_mixin",
    "register",
    "register_stored_weight",
    "unadapt",
    "with_options",
]
