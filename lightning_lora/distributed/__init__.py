"""Sharded models: placement, gradient reduction, base weights streamed from disk."""
