"""Reservation: an address for every plane that a folder stores, and memory only for those that are in it.

The whole model has its place from the beginning: one range of addresses, which costs nothing until it is written. A run
that is fetched is read straight to its place, and the pages of a run that leaves are given back to the system at once.
So nothing is ever moved to close a gap: the processor's page tables do that. Every run has whole pages of its own, for
a page can only be given back if nothing else lies on it.

Where a run begins on its first page is where it begins on a page of its file. Then the system can read a page of the
file to a page of memory without a copy (O_DIRECT).

The first write to a page costs more than reading its bytes from a good disk, up to 4 µs for 4096 bytes on a virtual
machine. So where all runs of a huge page (2 MiB) come together, they share one: that is said by `coming`, before they
are written. Huge pages are not used elsewhere, for one run would make memory resident for its neighbours too. Where
runs come and go all the time, pages of those that left (`release`) are moved to those that come.

Source: mmap(2), madvise(2) with MADV_DONTNEED and MADV_FREE, open(2) with O_DIRECT, mincore(2), mremap(2) with
MREMAP_DONTUNMAP.
"""

from __future__ import annotations

import ctypes
import errno
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
_MADV_FREE = 8
_MAYMOVE, _FIXED, _DONTUNMAP = 1, 2, 4  # of mremap
_FIXED_NOREPLACE = 0x100000  # of mmap
_FAILED = ctypes.c_void_p(-1).value
#: Each slot whose pages were moved is a mapping of its own for the system, which allows a process 65,530 of them.
_MOST_MOVED = 1 << 14


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
        self._spare: dict[int, Slot] = {}
        self._moved: set[int] = set()
        self._library = ctypes.CDLL(None, use_errno=True)
        self._library.mremap.restype = self._library.mmap.restype = ctypes.c_void_p
        self._always = always // HUGE_PAGE * HUGE_PAGE
        self._advise(mmap.MADV_NOHUGEPAGE, 0, self.size)
        self._advise(mmap.MADV_HUGEPAGE, 0, self._always)

    def slot(self, slot: Slot) -> memoryview:
        """The pages of a slot, to be written."""
        return self._view[slot.begin : slot.begin + slot.pages]

    def tensor(self, begin: int, end: int) -> Tensor:
        """The bytes from `begin` to `end`, uint8."""
        return self.whole[begin:end]

    def release(self, slots: Sequence[Slot]) -> None:
        """Say that these slots are not read any more. Their pages stay for slots that come, until `trim`."""
        self._spare.update((slot.begin, slot) for slot in slots)

    def trim(self, wanted: int | None = None) -> None:
        """Give at least so many bytes of released slots back to the system, if there are so many; all if not given."""
        chosen: list[Slot] = []
        while self._spare and (wanted is None or wanted > 0):
            _, slot = self._spare.popitem()
            chosen.append(slot)
            wanted = None if wanted is None else wanted - slot.pages
        self.give_back(chosen)

    def coming(self, slots: Sequence[Slot]) -> int:
        """Say that all these slots, of which none is written, will be; what is not to be is given back. Slots that were
        released give their pages to those of their size, and as many bytes as come anew are given back of the rest.

        Returns:
            The bytes that get huge pages, if the system has any.
        """
        anew = [slot for slot in slots if not self._reused(slot)] if self._spare else list(slots)
        self.trim(sum(slot.pages for slot in anew))
        found = 0
        for begin, end in _spans(anew):
            first, last = -(-begin // HUGE_PAGE) * HUGE_PAGE, end // HUGE_PAGE * HUGE_PAGE
            if first < last and self._advise(mmap.MADV_HUGEPAGE, first, last):
                found += last - first
        return found

    def give_back(self, slots: Sequence[Slot]) -> int:
        """Give the pages of slots back to the system; neighbours in one call. Returns the bytes."""
        given = 0
        for begin, end in _spans(slots):
            self._small_pages(begin, end)
            # a huge page of which a part leaves is split by this; without it all of it stays until the system is short
            for edge_begin, edge_end in _edges(begin, end):
                self._advise(_MADV_FREE, edge_begin, edge_end)
            self._map.madvise(mmap.MADV_DONTNEED, self._start + begin, end - begin)
            given += end - begin
        return given

    def _reused(self, slot: Slot) -> bool:
        """Find pages for a slot among those that were released: its own, or those of a slot of its size."""
        if self._spare.pop(slot.begin, None) is not None:
            return True
        other = next((begin for begin, spare in self._spare.items() if spare.pages == slot.pages), None)
        if other is None or (len(self._moved) >= _MOST_MOVED and slot.begin not in self._moved):
            return False
        if not self._move(other, slot.begin, slot.pages):
            return False
        del self._spare[other]
        self._moved.add(slot.begin)
        return True

    def _move(self, old: int, new: int, size: int) -> bool:
        """Move pages within the reservation; False where the system does not.

        In two steps, since systems before Linux 6.17 unmap the target and only then find that a source is made of
        several mappings. To anywhere such a source fails and changes nothing, and what was moved is one mapping.

        Raises:
            FoveateError: the addresses were lost.
        """
        base, length = self.whole.data_ptr(), ctypes.c_size_t(size)
        target = ctypes.c_void_p(base + new)
        moved = self._library.mremap(
            ctypes.c_void_p(base + old), length, length, ctypes.c_int(_MAYMOVE | _DONTUNMAP), ctypes.c_void_p(None)
        )
        if moved in (None, _FAILED):
            return False
        flags = ctypes.c_int(_MAYMOVE | _FIXED)
        if self._library.mremap(ctypes.c_void_p(moved), length, length, flags, target) != target.value:
            self._library.munmap(ctypes.c_void_p(moved), length)
            self._map_again(target, length)
            return False
        self._small_pages(old, old + size)
        return True

    def _map_again(self, target: ctypes.c_void_p, length: ctypes.c_size_t) -> None:
        """Make sure that addresses of the reservation are mapped, before somebody else gets them."""
        protection = ctypes.c_int(mmap.PROT_READ | mmap.PROT_WRITE)
        flags = ctypes.c_int(mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE | _FIXED_NOREPLACE)
        found = self._library.mmap(target, length, protection, flags, ctypes.c_int(-1), ctypes.c_long(0))
        if found not in (target.value, _FAILED) or (found == _FAILED and ctypes.get_errno() != errno.EEXIST):
            raise FoveateError("the system took back addresses that planes have: load the model again")

    def _small_pages(self, begin: int, end: int) -> None:
        """Have the system make no huge pages of those that this range is a part of: they would be resident whole."""
        first, last = begin // HUGE_PAGE * HUGE_PAGE, -(-end // HUGE_PAGE) * HUGE_PAGE
        self._advise(mmap.MADV_NOHUGEPAGE, max(first, self._always), min(last, self.size))

    def _advise(self, advice: int, begin: int, end: int) -> bool:
        """Give advice on a range; whether the system took it, which it does not if it was built without huge pages."""
        with suppress(OSError):
            if begin < end:
                self._map.madvise(advice, self._start + begin, end - begin)
                return True
        return False

    def resident(self) -> int:
        """Bytes of it that are in memory now, as the system counts them."""
        count = self.size // PAGE
        flags = (ctypes.c_ubyte * count)()
        if self._library.mincore(ctypes.c_void_p(self.whole.data_ptr()), ctypes.c_size_t(self.size), flags):
            raise OSError(ctypes.get_errno(), "mincore failed")
        return PAGE * sum(flag & 1 for flag in flags)


def _edges(begin: int, end: int) -> list[tuple[int, int]]:
    """The parts of a range that do not fill a huge page."""
    first, last = -(-begin // HUGE_PAGE) * HUGE_PAGE, end // HUGE_PAGE * HUGE_PAGE
    if first > last:
        return [(begin, end)]
    return [(a, b) for a, b in ((begin, first), (last, end)) if a < b]


def _spans(slots: Sequence[Slot]) -> list[tuple[int, int]]:
    """Where slots begin and end, with neighbours in one."""
    spans: list[tuple[int, int]] = []
    for slot in sorted(slots, key=lambda s: s.begin):
        end = slot.begin + slot.pages
        if spans and spans[-1][1] == slot.begin:
            spans[-1] = (spans[-1][0], end)
        else:
            spans.append((slot.begin, end))
    return spans
