"""Saved tensors that are computed again instead of being stored."""
