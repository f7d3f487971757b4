"""Fused experts with adapters: rows sorted by expert, and every product of theirs with the factors kept apart."""
