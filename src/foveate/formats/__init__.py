"""Levels, packing: values and pure functions. See `docs/format.md`."""
