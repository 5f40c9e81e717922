"""Places: where the bytes of a run are while they are not in memory.

A place is told what to read and where to write it: a descriptor, an offset, a length and a checksum, as values. It
knows neither models nor folders. A *file place* reads a plane's file by pread. A *host place* copies from a block of
memory, on this device or another one.

Reads are explicit. They go past the page cache where the file system can (O_DIRECT), so that a plane takes memory once
and not twice; here that is also faster (docs/decisions.md). A descriptor stays open as long as its place: a folder that
is replaced meanwhile still serves what it had.

Source: open(2), preadv(2).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from contextlib import suppress
from typing import Protocol

import torch
from torch import Tensor

from foveate.errors import CheckpointError
from foveate.memory.runs import Run

_PAGE = 4096


class Place(Protocol):
    """Where runs are read from."""

    def read(self, run: Run, pages: memoryview, lead: int) -> None:
        """Write the bytes of a run to memory, and compare them with its checksum.

        Args:
            run: which one.
            pages: whole pages, which nothing else uses.
            lead: where in them the run begins.

        Raises:
            OSError: it cannot be read, or is not what was saved (`CheckpointError`).
        """

    def close(self) -> None:
        """Give back what it holds; nothing can be read afterwards."""


class FilePlace:
    """The file of a plane.

    Attributes:
        name: what messages call it.
        direct: whether it is read past the page cache.
    """

    def __init__(self, name: str, descriptor: int, *, direct: bool = True) -> None:
        """Hold a file.

        Args:
            name: what messages call it.
            descriptor: an open file; a copy of it is held, and it may be closed.
            direct: read past the page cache, if the file system can.
        """
        self.name = name
        self._cached = os.dup(descriptor)
        self._direct: int | None = None
        flag = getattr(os, "O_DIRECT", 0)
        if direct and flag:
            # by its descriptor and not by its name, which may be another file's by now
            with suppress(OSError):
                self._direct = os.open(f"/proc/self/fd/{self._cached}", os.O_RDONLY | os.O_CLOEXEC | flag)

    @property
    def direct(self) -> bool:
        """Whether the file is read past the page cache."""
        return self._direct is not None

    def read(self, run: Run, pages: memoryview, lead: int) -> None:
        """See `Place.read`."""
        self.transfer(run, pages, lead)
        self.verify(run, pages, lead)

    def transfer(self, run: Run, pages: memoryview, lead: int) -> None:
        """Read without the comparison."""
        done = 0
        if self._direct is not None and run.offset % _PAGE == lead:
            try:
                done = os.preadv(self._direct, [pages], run.offset - lead) - lead
            except OSError as error:
                if error.errno != errno.EINVAL:  # the file system wants other alignment than it said
                    raise
                direct, self._direct = self._direct, None
                os.close(direct)
        done = max(done, 0)
        while done < run.size:
            count = os.preadv(self._cached, [pages[lead + done : lead + run.size]], run.offset + done)
            if not count:
                raise CheckpointError(f"{self.name} is cut off: it ends before {run}")
            done += count

    def verify(self, run: Run, pages: memoryview, lead: int) -> None:
        """Raise `CheckpointError` unless the bytes are those that were saved."""
        if not run.holds(pages[lead : lead + run.size]):
            raise CheckpointError(f"{self.name} is damaged: the checksum of {run} does not match")

    def close(self) -> None:
        """See `Place.close`."""
        for descriptor in (self._direct, self._cached):
            if descriptor is not None:
                os.close(descriptor)
        self._direct = None
        self._cached = -1


class HostPlace:
    """Blocks of memory that hold runs, on this device or another one.

    A run is copied by torch, so the blocks may be pinned memory, or a device's.
    """

    def __init__(self, blocks: Mapping[tuple[str, int, int], Tensor]) -> None:
        """Hold the bytes (uint8 1-D) of each run, by its (weight, plane, first strip)."""
        self._blocks = dict(blocks)

    def read(self, run: Run, pages: memoryview, lead: int) -> None:
        """See `Place.read`."""
        source = self._blocks.get((run.weight, run.plane, run.first))
        if source is None or source.numel() != run.size:
            raise CheckpointError(f"{run} is not held here")
        target = torch.frombuffer(pages, dtype=torch.uint8, offset=lead, count=run.size)
        target.copy_(source)
        if not run.holds(pages[lead : lead + run.size]):
            raise CheckpointError(f"the checksum of {run} does not match")

    def close(self) -> None:
        """See `Place.close`."""
        self._blocks = {}
