"""Adapter-only checkpoints: what they hold, and whether they fit a model."""
