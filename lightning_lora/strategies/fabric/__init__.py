"""Strategies for Fabric: the base classes of :mod:`lightning_lora.fabric`."""
