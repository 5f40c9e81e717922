"""Frontier: a chain of precision maps, each one step cheaper than the one before."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from foveate.precision.maps import PrecisionMap


@dataclass(frozen=True)
class Frontier:
    """A chain of precision maps, each one step cheaper than the one before; index 0 is the best."""

    maps: tuple[PrecisionMap, ...]

    def __len__(self) -> int:
        return len(self.maps)

    def __getitem__(self, index: int) -> PrecisionMap:
        return self.maps[index]

    def __iter__(self) -> Iterator[PrecisionMap]:
        return iter(self.maps)
