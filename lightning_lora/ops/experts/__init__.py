"""Fused experts with adapters: rows are sorted by expert, and A and B are multiplied one after the other."""
