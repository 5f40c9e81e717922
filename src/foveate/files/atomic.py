"""Writing a file so that its name always stands for a whole one, after a kill and after a power cut too.

A file is written under another name in the same folder, brought to the disk, and renamed; then the folder is brought
to the disk, so that the new name lasts.
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
    """Give a path to write to; what is written there takes the place of `target`, whole, when the block ends.

    The file is as open as its folder. If the block fails, `target` stays as it was.

    Raises:
        OSError: it cannot be written.
    """
    make_folder(target.parent)
    # a folder, since whoever writes may put temporary files of its own beside the path
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        temporary = staging / target.name
        yield temporary
        temporary.chmod(target.parent.stat().st_mode & 0o666)
        commit(temporary, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def commit(temporary: Path, target: Path) -> None:
    """Bring a complete file to the disk and give it its name, which then lasts."""
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, target)
    _sync(target.parent)


def make_folder(folder: Path) -> list[Path]:
    """Make a folder and its parents, and have them last; returns those that are new, the outermost first."""
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
    """Make a new name last: what follows it must not be on the disk before it is."""
    with suppress(OSError):  # a system that cannot open folders, or sync them
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)
