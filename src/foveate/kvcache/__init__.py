"""Packed caches of keys and values, and their calibration."""
