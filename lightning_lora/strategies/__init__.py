"""Strategies: what is saved and loaded, and how gradients are reduced."""
