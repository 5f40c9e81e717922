"""Memory that is given back to the system when a tensor is freed.

glibc maps large blocks one by one and unmaps them when they are freed, but learns from each to keep blocks of that
size, up to 32 MiB, in its heap instead. A pass whose tensors are of that order then holds twice what is in use. Where
memory is short the threshold is held at 4 MiB; it is put at what glibc would have learned afterwards. Other allocators
are left alone.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of malloc.h
_SMALL, _LEARNED = 4 << 20, 32 << 20


@contextmanager
def given_back(wanted: bool) -> Iterator[None]:
    """While this is open, what is freed is not kept, if that is wanted."""
    library = _glibc() if wanted else None
    if library is None:
        yield
        return
    library.mallopt(_MMAP_THRESHOLD, _SMALL)
    try:
        library.malloc_trim(0)
        yield
    finally:
        library.mallopt(_MMAP_THRESHOLD, _LEARNED)
        library.mallopt(_TRIM_THRESHOLD, 2 * _LEARNED)


def _glibc() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "gnu_get_libc_version") else None
