"""The stored form: levels, grids of scales and offsets, packing. Values and pure functions; see `docs/format.md`."""
