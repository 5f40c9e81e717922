"""Atomic writes: a name always stands for a complete file, also after a kill or a loss of power.

A file is written under a temporary name in the same folder, synced to the disk, and renamed. Then the folder is synced,
so that the new name is on the disk too.

Source: rename(2), fsync(2).
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Yield a path to write to; what is written there replaces `target` as a whole when the block ends.

    The file gets the permissions of its folder. If the block fails, `target` stays as it was.

    Raises:
        OSError: it cannot be written.
    """
    make_folder(target.parent)
    # a folder of its own, since the writer may put temporary files beside the path
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        temporary = staging / target.name
        yield temporary
        temporary.chmod(target.parent.stat().st_mode & 0o666)
        commit(temporary, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def commit(temporary: Path, target: Path) -> None:
    """Sync a complete file to the disk, rename it to `target`, and sync the folder."""
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, target)
    _sync(target.parent)


def make_folder(folder: Path) -> list[Path]:
    """Make a folder and its parents, and sync them; returns those that are new, the outermost first."""
    new: list[Path] = []
    missing = [folder]
    while not missing[-1].exists() and missing[-1].parent != missing[-1]:
        missing.append(missing[-1].parent)
    for each in reversed(missing):
        try:
            each.mkdir()
        except FileExistsError:
            if not each.is_dir():
                raise
        else:
            _sync(each.parent)
            new.append(each)
    return new


def _sync(folder: Path) -> None:
    """Sync a folder, so that a new name in it is on the disk before anything that is written later."""
    with suppress(OSError):  # some systems cannot open or sync folders
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)
