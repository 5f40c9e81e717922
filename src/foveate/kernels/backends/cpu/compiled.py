"""Compiled libraries: built once, kept in the user's cache, and loaded only if nobody else can have written them.

A library is named by what went into it (sources, flags, torch, compiler), so a changed source or a new torch is a new
file and nothing is ever stale. Each build runs in a folder of its own and is moved into the cache in one step: two
processes may build at once, and one that is killed leaves nothing that another could wait for.

What is loaded runs with the user's rights. So a library must belong to the user or to root, in a folder that does, and
neither may be writable for anybody else; folders that are made here are the user's alone (mode 0700).
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import stat
import tempfile
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

import torch

ABANDONED_AFTER_S = 3600.0
_OTHERS = stat.S_IWGRP | stat.S_IWOTH


def cache_folder() -> Path:
    """Where compiled libraries are kept: `$XDG_CACHE_HOME/foveate`, or `~/.cache/foveate`."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "foveate"


def compiler() -> str | None:
    """The C++ compiler: `$CXX`, or `c++`; None where there is none."""
    return shutil.which(os.environ.get("CXX") or "c++")


def fingerprint(files: Iterable[Path], *settings: object) -> str:
    """A name for the library that these files and settings give with this machine's torch and compiler.

    The names of files count from their common folder on, and not where that folder is. There must be a file.
    """
    digest = hashlib.sha256()
    ordered = sorted(files)
    root = os.path.commonpath([path.parent for path in ordered])
    for path in ordered:
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    stamp = ""
    if found := compiler():
        real = os.path.realpath(found)
        status = os.stat(real)
        stamp = f"{real} {status.st_size} {status.st_mtime_ns}"
    digest.update(repr((settings, torch.__version__, platform.machine(), stamp)).encode())
    return digest.hexdigest()[:16]


def distrusted(target: Path) -> str | None:
    """Why a library of the cache is not to be loaded, nor one to be built there; None if it may be.

    Looks at the file, at its folder and at the cache, as far as they exist. A cache of the user's own that others can
    write is closed to them first.
    """
    cache = target.parent.parent
    with suppress(OSError):  # not there, or not ours: then the check below says so
        status = cache.lstat()
        if status.st_uid == os.geteuid() and stat.S_ISDIR(status.st_mode) and status.st_mode & _OTHERS:
            cache.chmod(stat.S_IMODE(status.st_mode) & ~_OTHERS)
    for path, is_kind, kind in (
        (cache, stat.S_ISDIR, "a folder"),
        (target.parent, stat.S_ISDIR, "a folder"),
        (target, stat.S_ISREG, "a regular file"),
    ):
        try:
            # a link to the cache is the user's own doing, and what it leads to is what counts
            status = path.stat() if path is cache else path.lstat()
        except FileNotFoundError:
            return None
        if not is_kind(status.st_mode):
            return f"{path} is not {kind}"
        if status.st_uid not in (os.geteuid(), 0):
            return f"{path} belongs to another user (uid {status.st_uid})"
        if status.st_mode & _OTHERS:
            return f"{path} can be written by others (mode {stat.S_IMODE(status.st_mode):04o})"
    return None


def build(
    name: str, sources: Sequence[Path], flags: Sequence[str], target: Path | None, include: Path | None = None
) -> None:
    """Compile a library, load it, and move it to `target`; without a target nothing is kept of it.

    Args:
        name: of the library.
        sources: C++ files. Their names must differ even where their folders do: an object is named by its source.
        flags: of the compiler.
        target: a file that does not exist, in a folder of its own in the cache (`distrusted` has nothing against it).
        include: a folder that the sources' includes are relative to.

    Raises:
        RuntimeError, OSError, ImportError: there is no compiler, or it fails, or the folder cannot be written.
    """
    from torch.utils import cpp_extension  # slow to import, and not needed once there is a library

    if target is not None:
        target.parent.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        target.parent.mkdir(mode=0o700, exist_ok=True)
        for old in target.parent.parent.glob("*/build-*"):
            with suppress(FileNotFoundError):  # another process may be clearing up too
                if time.time() - old.stat().st_mtime > ABANDONED_AFTER_S:
                    shutil.rmtree(old, ignore_errors=True)
    within = None if target is None else target.parent
    with tempfile.TemporaryDirectory(prefix="build-", dir=within, ignore_cleanup_errors=True) as folder:
        cpp_extension.load(
            name=name,
            sources=[str(path) for path in sources],
            extra_cflags=list(flags),
            extra_include_paths=None if include is None else [str(include)],
            build_directory=folder,
            is_python_module=False,
        )
        if target is not None:
            made = Path(folder) / f"{name}.so"
            made.chmod(0o700)  # what the user's umask leaves to a group may be more
            os.replace(made, target)
