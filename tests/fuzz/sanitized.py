"""The CPU kernels with AddressSanitizer and UndefinedBehaviorSanitizer in them, and how a Python that loads them runs.

The library is compiled from the same sources, kept in the cache by its hash beside the plain one, and loaded only in a
process that began with the sanitizers' runtime: an uninstrumented Python must be given it by LD_PRELOAD.
"""

from __future__ import annotations

import os
import subprocess
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from foveate.kernels.backends.cpu.compiled import cache_folder, compiler, distrusted, fingerprint
from foveate.kernels.backends.cpu.library import FLAGS, SOURCES, source_files

#: `vptr` asks for type information that torch's own libraries do not give.
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize=vptr")
#: -O1: reports name the line, and compiling is bearable.
OWN_FLAGS = ("-O1", "-g1", "-fno-omit-frame-pointer", *SANITIZERS)
#: Sizes beyond this are errors, as they would be on a machine that does not have them.
MOST_MB = 2048


class NoSanitizers(Exception):
    """This machine cannot compile or run sanitized code; the message says what is missing."""


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise NoSanitizers(f"{' '.join(command[:2])} ... failed:\n{done.stderr[-2000:]}")
    return done.stdout.strip()


def _found_compiler() -> str:
    found = compiler()
    if found is None:
        raise NoSanitizers("no C++ compiler was found (set CXX, or install g++ or clang++)")
    return found


def runtimes() -> list[str]:
    """The sanitizers' shared libraries, to be loaded before everything else; none where the compiler links them in."""
    found = []
    for name in ("libasan.so", "libubsan.so"):
        path = _run([_found_compiler(), f"-print-file-name={name}"])
        if os.path.isabs(path):
            found.append(path)
    if not found:
        raise NoSanitizers(f"{_found_compiler()} has no shared runtime of its sanitizers (libasan.so)")
    return found


def library() -> Path:
    """Build the sanitized kernels, or find them in the cache.

    Raises:
        NoSanitizers: it cannot be built here.
    """
    cxx = _found_compiler()
    runtimes()
    flags = [flag for flag in FLAGS if not flag.startswith("-O")] + list(OWN_FLAGS)
    target = cache_folder() / f"sanitized-{fingerprint(source_files(), flags)}" / "foveate_cpu.so"
    danger = distrusted(target)
    if danger is not None:
        raise NoSanitizers(danger)
    if target.exists():
        return target
    from torch.utils import cpp_extension

    includes = [*cpp_extension.include_paths("cpu"), sysconfig.get_path("include")]
    system = (part for path in includes for part in ("-isystem", path))
    base = [cxx, "-std=c++20", "-fPIC", *flags, "-I", str(SOURCES), *system]
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="build-", dir=target.parent, ignore_cleanup_errors=True) as folder:
        objects = {
            source: str(Path(folder) / f"{source.stem}.o") for source in source_files() if source.suffix == ".cpp"
        }
        with ThreadPoolExecutor(min(2, os.cpu_count() or 1)) as pool:
            list(pool.map(lambda s: _run([*base, "-c", str(s), "-o", objects[s]]), objects))
        made = Path(folder) / target.name
        libraries = [f"-L{path}" for path in cpp_extension.library_paths()]
        _run(
            [cxx, "-shared", *flags, *objects.values(), *libraries, "-lc10", "-ltorch_cpu", "-ltorch", "-o", str(made)]
        )
        made.chmod(0o700)
        os.replace(made, target)
    return target


def environment() -> dict[str, str]:
    """What a process that loads the library is to be started with."""
    return {
        **os.environ,
        "LD_PRELOAD": ":".join(runtimes()),
        # leaks: Python and torch keep much to the end; a size that is too large is an error to the op, not a finding
        "ASAN_OPTIONS": f"detect_leaks=0:allocator_may_return_null=1:max_allocation_size_mb={MOST_MB}",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
        "OMP_NUM_THREADS": "2",
    }


def load() -> None:
    """Load the library in this process, in place of the plain kernels, which nothing loads from then on."""
    from foveate.kernels.backends import table  # the ops must be defined before they are given kernels

    path = library()
    torch.ops.load_library(path)
    status = table.cpu.Status(torch.ops.foveate._cpu_isa(""), "with sanitizers", path)
    table.cpu.load = lambda: status
    assert table.ensure_loaded() is status, "the plain kernels were loaded before"
