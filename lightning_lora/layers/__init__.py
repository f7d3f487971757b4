"""Adapted layers: one file per kind of base layer, a registry that picks by type."""

from lightning_lora.layers.base import LoRALayer, adapt, unadapt
from lightning_lora.layers.registry import is_linear, mixin_for, register

__all__ = ["LoRALayer", "adapt", "is_linear", "mixin_for", "register", "unadapt"]
