"""Megatron-core's models: their weights, their layers' names, and their tensors as parts of whole ones."""

from lightning_lora.megatron import family as family  # registers them
