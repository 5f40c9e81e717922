"""Modules on planes; quantize and apply."""
