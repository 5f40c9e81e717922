"""Held: the runs of one model, where each has its place in memory, and where it is read from. Values, and no state."""

from __future__ import annotations

import mmap
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from foveate.formats.levels import NESTED_LEVELS, PLANES
from foveate.memory.places import Place
from foveate.memory.reservation import Layout, Reservation
from foveate.memory.runs import Run


@dataclass(frozen=True, kw_only=True)
class Held:
    """What a residency is made of.

    Attributes:
        runs: every run of the folder.
        layout: where each has its place.
        reservation: the memory.
        places: for each plane, where its runs are read from.
        strips: for each weight, NT.
        fixed: bytes that the model takes besides planes.
    """

    runs: tuple[Run, ...]
    layout: Layout
    reservation: Reservation
    places: Mapping[int, Place]
    strips: Mapping[str, int]
    fixed: int

    @cached_property
    def below(self) -> list[tuple[int, ...]]:
        """For each run, the runs without which it is of no use."""
        return runs_below(self.runs)

    @cached_property
    def of_weight(self) -> dict[str, list[int]]:
        """The runs of each weight."""
        found: dict[str, list[int]] = {name: [] for name in self.strips}
        for number, run in enumerate(self.runs):
            found[run.weight].append(number)
        return found

    def closed(self, numbers: Collection[int]) -> frozenset[int]:
        """These runs and all that they need."""
        found, stack = set(numbers), list(numbers)
        while stack:
            for other in self.below[stack.pop()]:
                if other not in found:
                    found.add(other)
                    stack.append(other)
        return frozenset(found)

    def caps(self, name: str, present: Collection[int]) -> Tensor:
        """The highest level of each strip of a weight that can be read if these runs are in memory, uint8 [NT]."""
        there = torch.ones(PLANES, self.strips[name], dtype=torch.bool)
        for number in self.of_weight[name]:
            if number not in present:
                run = self.runs[number]
                there[run.plane, run.first : run.last] = False
        planes = there.to(torch.uint8).cumprod(0).sum(0)
        return torch.tensor((0, *NESTED_LEVELS), dtype=torch.uint8)[planes]

    def transfer(self, number: int) -> int:
        """Read a run to its place, and return its bytes; errors as for `Place.read`."""
        run, slot = self.runs[number], self.layout.slots[number]
        self.places[run.plane].read(run, self.reservation.slot(slot), slot.lead)
        return run.size

    def read_once(self, number: int) -> memoryview:
        """The bytes of a run, read to memory of their own; errors as for `Place.read`."""
        run, slot = self.runs[number], self.layout.slots[number]
        pages = memoryview(mmap.mmap(-1, slot.pages))
        self.places[run.plane].read(run, pages, slot.lead)
        return pages[slot.lead : slot.lead + run.size]

    def close(self) -> None:
        """Close the files."""
        for place in self.places.values():
            place.close()


def runs_below(runs: Sequence[Run]) -> list[tuple[int, ...]]:
    """For each run, the runs of the plane before it that share a strip with it."""
    by_plane: dict[tuple[str, int], list[int]] = {}
    for number, run in enumerate(runs):
        by_plane.setdefault((run.weight, run.plane), []).append(number)
    found = []
    for run in runs:
        others = by_plane.get((run.weight, run.plane - 1), [])
        found.append(tuple(n for n in others if runs[n].first < run.last and run.first < runs[n].last))
    return found
