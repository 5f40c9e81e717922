"""Ops on bit planes: schema and dispatch in `ops`, meaning in `reference`, C++ in `cpu` and `csrc`."""
