"""Frontier: a chain of maps, each one step cheaper than the last."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from foveate.precision.maps import PrecisionMap
from foveate.precision.sites import Levels as Levels
from foveate.precision.sites import Site as Site
from foveate.precision.sites import find_sites as find_sites
from foveate.precision.sites import meant_sites as meant_sites
from foveate.precision.sites import tile_levels as tile_levels


@dataclass(frozen=True)
class Frontier:
    """A chain of maps, each one step cheaper than the last; index 0 is the best."""

    maps: tuple[PrecisionMap, ...]

    def __len__(self) -> int:
        return len(self.maps)

    def __getitem__(self, index: int) -> PrecisionMap:
        return self.maps[index]

    def __iter__(self) -> Iterator[PrecisionMap]:
        return iter(self.maps)
