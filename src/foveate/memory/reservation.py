"""Reservation: an address for every plane that a folder stores, and memory only for those that are in it.

The whole model has its place from the beginning: one range of addresses, which costs nothing until it is written. A run
that is fetched is read straight to its place, and the pages of a run that leaves are given back to the system at once.
So nothing is ever moved to close a gap: the processor's page tables do that. Every run has whole pages of its own, for
a page can only be given back if nothing else lies on it.

Where a run begins on its first page is where it begins on a page of its file. Then the system can read a page of the
file to a page of memory without a copy (O_DIRECT).

Source: mmap(2), madvise(2) with MADV_DONTNEED, open(2) with O_DIRECT, mincore(2).
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.errors import FoveateError
from foveate.memory.arena import ALIGNMENT, HUGE_PAGE
from foveate.memory.runs import Run

PAGE = mmap.PAGESIZE
#: A file whose planes do not begin at a multiple of this is read through the page cache: kernels need it in memory.
_ALIGNED = ALIGNMENT
_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)


@dataclass(frozen=True, kw_only=True)
class Slot:
    """The place of a run: `pages` bytes from `begin` on, in which the run begins after `lead` bytes."""

    begin: int
    pages: int
    lead: int


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where everything lies in a reservation.

    Attributes:
        slots: the place of each run, in the order of the runs.
        begins: for each (weight, plane) that has runs, where the tensor of this plane begins.
        ends: for each of them, where it ends.
        starts: for each of them, the bytes from there to the first byte of each run, by the run's first strip.
        total: bytes of the reservation.
        always: bytes at its beginning whose runs never leave.
    """

    slots: tuple[Slot, ...]
    begins: Mapping[tuple[str, int], int]
    ends: Mapping[tuple[str, int], int]
    starts: Mapping[tuple[str, int], Mapping[int, int]]
    total: int
    always: int


def lay_out(runs: Sequence[Run], units: Mapping[tuple[str, int], int], page: int = PAGE) -> Layout:
    """Give each run whole pages.

    Args:
        runs: the runs, of a weight's plane in ascending strips.
        units: for each (weight, plane), the bytes of a tile; places are multiples of them.
        page: bytes of a page.

    Raises:
        FoveateError: a tile does not divide a page.
    """
    if any(page % unit for unit in units.values()):
        raise FoveateError(f"a page of {page} bytes is not a multiple of the bytes of a tile, {sorted(units.values())}")
    slots: dict[int, Slot] = {}
    begins: dict[tuple[str, int], int] = {}
    ends: dict[tuple[str, int], int] = {}
    starts: dict[tuple[str, int], dict[int, int]] = {}
    shifts: dict[tuple[str, int], int] = {}
    at = always = 0
    # the planes that every level needs come first, so that they share huge pages with nothing that leaves
    for number in sorted(range(len(runs)), key=lambda n: (runs[n].plane, n)):
        run = runs[number]
        key = (run.weight, run.plane)
        if key not in begins:
            shifts[key] = 0 if run.offset % _ALIGNED == 0 else run.offset % page
            begins[key] = at + (run.offset - shifts[key]) % units[key]
        lead = (run.offset - shifts[key]) % page
        pages = -(-(lead + run.size) // page) * page
        slots[number] = Slot(begin=at, pages=pages, lead=lead)
        starts.setdefault(key, {})[run.first] = at + lead - begins[key]
        at += pages
        ends[key] = begins[key] + (at - begins[key]) // units[key] * units[key]
        if run.plane == 0:
            always = at
    return Layout(
        slots=tuple(slots[n] for n in range(len(runs))),
        begins=begins,
        ends=ends,
        starts=starts,
        total=at,
        always=always,
    )


class Reservation:
    """A range of addresses in pages.

    Attributes:
        size: bytes of address space, a multiple of a page.
        whole: all of it, uint8 [size]. What was never written, or was given back, reads as zeros.
    """

    def __init__(self, size: int, always: int = 0) -> None:
        """Reserve addresses.

        Args:
            size: how many bytes.
            always: bytes at the beginning that are never given back, and so may lie on huge pages.

        Raises:
            FoveateError: this system cannot give single pages back, or has no room for the addresses.
        """
        if not sys.platform.startswith("linux"):
            raise FoveateError(
                f"planes can stay on disk on Linux only, and this is {sys.platform}: load with keep= a map that fits"
            )
        self.size = -(-max(size, 1) // PAGE) * PAGE
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE
        try:
            self._map = mmap.mmap(-1, self.size + HUGE_PAGE, flags=flags)
        except OSError as error:
            raise FoveateError(f"the system does not reserve addresses for {self.size} bytes: {error}") from error
        block = torch.frombuffer(self._map, dtype=torch.uint8)
        self._start = -block.data_ptr() % HUGE_PAGE
        self.whole = block[self._start : self._start + self.size]
        self._view = memoryview(self._map)[self._start : self._start + self.size]
        with suppress(OSError):  # a kernel that was built without huge pages
            self._map.madvise(mmap.MADV_NOHUGEPAGE, self._start, self.size)
            if always >= HUGE_PAGE:
                self._map.madvise(mmap.MADV_HUGEPAGE, self._start, always // HUGE_PAGE * HUGE_PAGE)

    def slot(self, slot: Slot) -> memoryview:
        """The pages of a slot, to be written."""
        return self._view[slot.begin : slot.begin + slot.pages]

    def tensor(self, begin: int, end: int) -> Tensor:
        """The bytes from `begin` to `end`, uint8."""
        return self.whole[begin:end]

    def give_back(self, slots: Sequence[Slot]) -> int:
        """Give the pages of slots back to the system; neighbours in one call. Returns the bytes."""
        given = 0
        spans: list[list[int]] = []
        for slot in sorted(slots, key=lambda s: s.begin):
            if spans and spans[-1][1] == slot.begin:
                spans[-1][1] += slot.pages
            else:
                spans.append([slot.begin, slot.begin + slot.pages])
        for begin, end in spans:
            self._map.madvise(mmap.MADV_DONTNEED, self._start + begin, end - begin)
            given += end - begin
        return given

    def resident(self) -> int:
        """Bytes of it that are in memory now, as the system counts them."""
        library = ctypes.CDLL(None, use_errno=True)
        count = self.size // PAGE
        flags = (ctypes.c_ubyte * count)()
        if library.mincore(ctypes.c_void_p(self.whole.data_ptr()), ctypes.c_size_t(self.size), flags):
            raise OSError(ctypes.get_errno(), "mincore failed")
        return PAGE * sum(flag & 1 for flag in flags)
