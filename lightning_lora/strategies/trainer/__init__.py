"""Strategies for the Trainer, and what a Trainer's run needs besides."""
