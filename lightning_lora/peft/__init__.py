"""PEFT directories: read, written, combined."""
