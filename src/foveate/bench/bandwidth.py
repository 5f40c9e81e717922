"""The machine's own read bandwidth: what a kernel that only waits for memory would reach.

Measured by a loop in C++ (`read.cpp`) that adds up memory on huge pages and does nothing else, with torch's threads.
Torch's own reductions read at half that speed or less, so there is no substitute where nothing can be compiled.

How best to write the loop depends on the machine, so several are tried and the fastest is the yardstick. Each takes its
turn in every round and the medians are compared: a machine whose bandwidth changes in between changes it for all.
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
    """One way to write the loop.

    Attributes:
        streams: places that a thread reads from in turn.
        ahead: cache lines that are prefetched ahead of each; 0 for none.
        cache: which cache they are prefetched into, 1 or 2.
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
    """Blocks of memory, each from a cache line on, that are read one after the other in one call."""

    def __init__(self, blocks: Sequence[Tensor]) -> None:
        self._kept = tuple(blocks)
        self._starts = (ctypes.c_void_p * len(blocks))(*(b.data_ptr() for b in blocks))
        self._bytes = (ctypes.c_int64 * len(blocks))(*(b.numel() * b.element_size() for b in blocks))
        self._read = _library().foveate_read

    def sum(self, loop: Loop) -> int:
        """The sum of the 64-bit words modulo 2^64 (what does not fill 4 cache lines of every stream is left out)."""
        total: int = self._read(self._starts, self._bytes, len(self._kept), *loop)
        return total

    def bandwidth(self, loop: Loop) -> float:
        """Bytes a second of reading them once."""
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
