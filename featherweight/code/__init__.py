"""Tensors as few bytes: entropy coding with exact arithmetic, the same on every machine."""
