"""Residency in a live model: planes that come and go between two calls of it."""
