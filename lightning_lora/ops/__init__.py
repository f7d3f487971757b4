"""Tensor math of adapters: no modules, no process groups."""
