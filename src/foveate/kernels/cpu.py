"""The compiled CPU kernels: built on first use, kept in the user's cache, loaded in milliseconds afterwards.

A build is named by what went into it (sources, flags, torch, compiler), so a changed source or a new torch is a new
file and nothing is
ever stale. Each build runs in a folder of its own and is moved into the cache in one step: two processes may build at
once, and one that is killed leaves nothing that another could wait for.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import time
import warnings
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from foveate.progress import say

SOURCES = Path(__file__).parent / "csrc"
# A fused multiply-add must be one where the kernels ask for it, and nowhere else: the bits are the same everywhere.
FLAGS = ("-O3", "-fopenmp", "-ffp-contract=off", "-fno-math-errno", "-Wno-psabi", "-Wno-ignored-attributes")
ABANDONED_AFTER_S = 3600.0

# Which instructions the library uses: a question about it, not an op, so it is defined here and has no reference.
_FRAGMENT = torch.library.Library("foveate", "FRAGMENT")
if not hasattr(torch.ops.foveate, "_cpu_isa"):
    _FRAGMENT.define("_cpu_isa(str force) -> str")


@dataclass(frozen=True)
class Status:
    """What became of the compiled kernels.

    Attributes:
        isa: `avx512_vnni`, `avx2` or `portable`; None where there are no compiled kernels.
        reason: one sentence: where they come from, or why there are none.
        path: the library that was loaded.
    """

    isa: str | None
    reason: str
    path: Path | None


def cache_folder() -> Path:
    """Where built kernels are kept: `$XDG_CACHE_HOME/foveate`, or `~/.cache/foveate`."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "foveate"


def _compiler() -> str | None:
    return shutil.which(os.environ.get("CXX") or "c++")


def _fingerprint(compiler: str | None) -> str:
    """A name for the library that these sources give on this machine."""
    digest = hashlib.sha256()
    for path in sorted(SOURCES.iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    stamp = ""
    if compiler:
        real = os.path.realpath(compiler)
        stat = os.stat(real)
        stamp = f"{real} {stat.st_size} {stat.st_mtime_ns}"
    digest.update(repr((FLAGS, torch.__version__, platform.machine(), stamp)).encode())
    return digest.hexdigest()[:16]


def _build(target: Path) -> None:
    """Compile, load, and move the library to `target`."""
    from torch.utils import cpp_extension  # slow to import, and not needed once there is a library

    target.parent.mkdir(parents=True, exist_ok=True)
    for old in target.parent.parent.glob("*/build-*"):
        with suppress(FileNotFoundError):  # another process may be clearing up too
            if time.time() - old.stat().st_mtime > ABANDONED_AFTER_S:
                shutil.rmtree(old, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix="build-", dir=target.parent, ignore_cleanup_errors=True) as folder:
        cpp_extension.load(
            name="foveate_cpu",
            sources=[str(path) for path in sorted(SOURCES.glob("*.cpp"))],
            extra_cflags=list(FLAGS),
            build_directory=folder,
            is_python_module=False,
        )
        os.replace(Path(folder) / "foveate_cpu.so", target)


@functools.cache
def load() -> Status:
    """Load the compiled kernels, after building them if they are not in the cache.

    Returns:
        The status; a machine without a compiler gets the reason in it and one warning.

    Raises:
        RuntimeError: the environment's FOVEATE_CPU names instructions that this machine does not have.
    """
    try:
        compiler = _compiler()
        target = cache_folder() / f"kernels-{_fingerprint(compiler)}" / "foveate_cpu.so"
        if target.exists():
            torch.ops.load_library(target)
            reason = "from the cache"
        elif compiler is None:
            raise RuntimeError("no C++ compiler was found (set CXX, or install g++ or clang++)")
        else:
            say("compiling foveate's kernels, which is done once and takes a minute or two")
            _build(target)
            reason = "built now"
    except (OSError, RuntimeError, ImportError, subprocess.CalledProcessError) as error:
        reason = f"no compiled kernels: {_first_line(error)}"
        warnings.warn(f"foveate runs its slow reference, {reason}", RuntimeWarning, stacklevel=2)
        return Status(None, reason, None)
    isa: str = torch.ops.foveate._cpu_isa("")  # refuses a FOVEATE_CPU that this machine does not have
    return Status(isa, reason, target)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
