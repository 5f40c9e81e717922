"""The read bandwidth of the machine: the upper limit for a kernel that waits only for memory.

A loop in C++ (`read.cpp`) sums memory on huge pages with torch's number of threads. Torch's own reductions read at half
that speed or less, so the measurement needs a C++ compiler.

The fastest form of the loop depends on the machine. Several forms are timed, and the fastest one is the reference. The
forms take turns in every round and their medians are compared, so that a change of bandwidth affects all of them.
"""

from __future__ import annotations

import ctypes
import functools
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

from torch import Tensor

from foveate.errors import FoveateError
from foveate.kernels.backends.cpu.compiled import build, cache_folder, distrusted, fingerprint

SOURCE = Path(__file__).with_name("read.cpp")
FLAGS = ("-O3", "-fopenmp", "-Wno-psabi")


class Loop(NamedTuple):
    """One form of the loop.

    Attributes:
        streams: the number of places that a thread reads from in turn.
        ahead: how many cache lines ahead of each place are prefetched; 0 for no prefetch.
        cache: the level of the cache that they are prefetched into, 1 or 2.
    """

    streams: int
    ahead: int = 0
    cache: int = 1


LOOPS = tuple(
    Loop(streams, ahead, cache)
    for streams in (1, 2, 4)
    for ahead, cache in ((0, 1), (16, 1), (64, 1), (16, 2), (32, 2), (64, 2))
)


@functools.cache
def _library() -> ctypes.CDLL:
    target = cache_folder() / f"read-{fingerprint([SOURCE], FLAGS)}" / "foveate_read.so"
    danger = distrusted(target)
    if danger is not None:
        raise FoveateError(f"read bandwidth is measured by a library of the cache, and {danger}")
    if not target.exists():
        try:
            build("foveate_read", [SOURCE], FLAGS, target)
        except (RuntimeError, OSError) as error:
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise FoveateError(f"read bandwidth needs a C++ compiler to be measured: {first}") from error
    library = ctypes.CDLL(str(target))
    library.foveate_read.argtypes = [ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 4]
    library.foveate_read.restype = ctypes.c_uint64
    return library


class Blocks:
    """Blocks of memory, each aligned to a cache line, that one call reads one after the other."""

    def __init__(self, blocks: Sequence[Tensor]) -> None:
        self._kept = tuple(blocks)
        self._starts = (ctypes.c_void_p * len(blocks))(*(b.data_ptr() for b in blocks))
        self._bytes = (ctypes.c_int64 * len(blocks))(*(b.numel() * b.element_size() for b in blocks))
        self._read = _library().foveate_read

    def sum(self, loop: Loop) -> int:
        """The sum of the 64-bit words modulo 2^64, without a rest that does not fill 4 cache lines of every stream."""
        total: int = self._read(self._starts, self._bytes, len(self._kept), *loop)
        return total

    def bandwidth(self, loop: Loop) -> float:
        """The bytes per second of reading the blocks once."""
        started = time.perf_counter()
        self.sum(loop)
        return sum(self._bytes) / (time.perf_counter() - started)


def fastest_loop(blocks: Blocks, rounds: int) -> Loop:
    """The loop that reads the blocks fastest, by the median of interleaved rounds."""
    found: dict[Loop, list[float]] = {loop: [] for loop in LOOPS}
    for _ in range(rounds):
        for loop, seen in found.items():
            seen.append(blocks.bandwidth(loop))
    return max(LOOPS, key=lambda loop: median(found[loop]))
