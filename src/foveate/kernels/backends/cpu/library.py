"""The compiled CPU kernels: built on first use, kept in the user's cache, loaded in milliseconds afterwards."""

from __future__ import annotations

import functools
import subprocess
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

from foveate.kernels.backends.cpu.compiled import build, cache_folder, compiler, distrusted, fingerprint
from foveate.progress import say

SOURCES = Path(__file__).parent / "csrc"
# A fused multiply-add must be one where the kernels ask for it, and nowhere else: the bits are the same everywhere.
FLAGS = ("-O3", "-fopenmp", "-ffp-contract=off", "-fno-math-errno", "-Wno-psabi", "-Wno-ignored-attributes")
_NAME = "foveate_cpu"

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
        path: the library that was loaded; None where it was not kept.
    """

    isa: str | None
    reason: str
    path: Path | None


def source_files() -> list[Path]:
    """All C++ files that the library is made of, headers included. They include each other by their path in `SOURCES`.

    Raises:
        FileNotFoundError: there are none.
    """
    files = sorted(path for path in SOURCES.rglob("*") if path.suffix in (".cpp", ".h"))
    if not files:
        raise FileNotFoundError(f"{SOURCES} has no C++ files")
    return files


@functools.cache
def load() -> Status:
    """Load the compiled kernels, after building them if they are not in the cache.

    A cache that others can write is not used: kernels are built for this process alone, and a warning says which file
    or folder it was.

    Returns:
        The status; a machine without a compiler gets the reason in it and one warning.

    Raises:
        RuntimeError: the environment's FOVEATE_CPU names instructions that this machine does not have.
    """
    target: Path | None
    try:
        target = cache_folder() / f"kernels-{fingerprint(source_files(), FLAGS)}" / f"{_NAME}.so"
        danger = distrusted(target)
        if danger is not None:
            warnings.warn(
                f"foveate loads no compiled kernels from its cache, and compiles them for this process alone: {danger};"
                " remove it, or make it yours and writable for nobody else, and they are kept again",
                RuntimeWarning,
                stacklevel=2,
            )
            target, reason = None, f"built now, for this process alone: {danger}"
            _build(None)
        elif target.exists():
            torch.ops.load_library(target)
            reason = "from the cache"
        else:
            _build(target)
            reason = "built now"
    except (OSError, RuntimeError, ImportError, subprocess.CalledProcessError) as error:
        reason = f"no compiled kernels: {_first_line(error)}"
        warnings.warn(f"foveate runs its slow reference, {reason}", RuntimeWarning, stacklevel=2)
        return Status(None, reason, None)
    isa: str = torch.ops.foveate._cpu_isa("")  # refuses a FOVEATE_CPU that this machine does not have
    return Status(isa, reason, target)


def _build(target: Path | None) -> None:
    if compiler() is None:
        raise RuntimeError("no C++ compiler was found (set CXX, or install g++ or clang++)")
    say("compiling foveate's kernels, which takes a minute or two" + ("" if target is None else " and is done once"))
    build(_NAME, [path for path in source_files() if path.suffix == ".cpp"], FLAGS, target, SOURCES)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
