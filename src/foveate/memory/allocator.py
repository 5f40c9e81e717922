"""Memory that is given back to the system when a tensor is freed.

glibc maps each large block by itself and unmaps it when it is freed. But each time it raises its threshold to the size
of that block, up to 32 MiB, and keeps smaller blocks in its heap. A pass over tensors of that size then holds twice the
memory that it uses. Where memory is short, `given_back` holds the threshold at 4 MiB, and afterwards sets it to the
value that glibc would have reached. Other allocators are not changed.

Source: mallopt(3), M_MMAP_THRESHOLD.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of malloc.h
_SMALL, _LARGEST = 4 << 20, 32 << 20  # bytes; the second is the most that glibc raises its threshold to

#: How many of these contexts are entered, in all threads, since the thresholds are the process's.
_entered = 0
_lock = threading.Lock()


@contextmanager
def given_back(wanted: bool) -> Iterator[None]:
    """Within this context, memory that is freed goes back to the system, if that is wanted. Contexts may be nested, and
    entered by several threads: the last that is left sets the thresholds back.
    """
    global _entered
    library = _glibc() if wanted else None
    if library is None:
        yield
        return
    with _lock:
        _entered += 1
        library.mallopt(_MMAP_THRESHOLD, _SMALL)
    try:
        library.malloc_trim(0)
        yield
    finally:
        with _lock:
            _entered -= 1
            if not _entered:
                library.mallopt(_MMAP_THRESHOLD, _LARGEST)
                library.mallopt(_TRIM_THRESHOLD, 2 * _LARGEST)
        library.malloc_trim(0)  # blocks below the threshold, which all its threads' heaps keep


def _glibc() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "gnu_get_libc_version") else None
