"""The machine's own read bandwidth: what a kernel that only waits for memory would reach.

Measured by a loop in C++ (`read.cpp`) that adds up memory on huge pages and does nothing else, with torch's threads.
Torch's own reductions read at half that speed or less, so there is no substitute where nothing can be compiled.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from foveate.errors import FoveateError
from foveate.kernels.cpu import cache_folder

SOURCE = Path(__file__).with_name("read.cpp")
FLAGS = ("-O3", "-fopenmp", "-Wno-psabi")
#: (streams a thread, cache lines prefetched ahead)
VARIANTS = tuple((streams, ahead) for streams in (1, 2, 4) for ahead in (0, 16, 64))


@functools.cache
def _library() -> ctypes.CDLL:
    stamp = repr((FLAGS, torch.__version__)).encode() + SOURCE.read_bytes()
    target = cache_folder() / f"read-{hashlib.sha256(stamp).hexdigest()[:16]}.so"
    if not target.exists():
        from torch.utils import cpp_extension  # slow to import

        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, ignore_cleanup_errors=True) as folder:
            try:
                cpp_extension.load(
                    name="foveate_read",
                    sources=[str(SOURCE)],
                    extra_cflags=list(FLAGS),
                    build_directory=folder,
                    is_python_module=False,
                )
            except (RuntimeError, OSError) as error:
                first = (str(error).splitlines() or [type(error).__name__])[0]
                raise FoveateError(f"read bandwidth needs a C++ compiler to be measured: {first}") from error
            os.replace(Path(folder) / "foveate_read.so", target)
    library = ctypes.CDLL(str(target))
    library.foveate_read.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64]
    library.foveate_read.restype = ctypes.c_uint64
    return library


def read(block: Tensor, streams: int = 1, ahead: int = 0) -> int:
    """The sum of a block's 64-bit words modulo 2^64 (what does not fill 4 cache lines of every stream is left out)."""
    total: int = _library().foveate_read(block.data_ptr(), block.numel() * block.element_size(), streams, ahead)
    return total


def bandwidth(blocks: Sequence[Tensor], variant: tuple[int, int]) -> float:
    """Bytes a second of reading the blocks once, one after the other."""
    library = _library()
    started = time.perf_counter()
    for block in blocks:
        library.foveate_read(block.data_ptr(), block.numel() * block.element_size(), *variant)
    return sum(b.numel() * b.element_size() for b in blocks) / (time.perf_counter() - started)


def fastest_variant(blocks: Sequence[Tensor], rounds: int = 3) -> tuple[int, int]:
    """The variant that reads the blocks fastest, the best of several rounds each."""
    return max(VARIANTS, key=lambda variant: max(bandwidth(blocks, variant) for _ in range(rounds)))
