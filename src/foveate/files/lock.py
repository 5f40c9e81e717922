"""One writer of a folder at a time, among processes and threads, on one machine or on several.

The lock is `flock` on an empty file in the folder. The system releases it when the process that holds it
ends, however it ends, so no lock is ever stale. The file is not removed: otherwise two writers could hold locks of two
files that had the same name one after the other.

Linux and macOS have `flock` on their own file systems. On NFS it works between machines (Linux 2.6.12 and later, if the
server has locks). Where a file system has no locks, or the system has no `flock` (Windows), a warning is given and the
caller continues; then nothing else may write to the folder meanwhile.

Source: flock(2).
"""

from __future__ import annotations

import errno
import importlib
import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from foveate.errors import CheckpointError
from foveate.files.atomic import make_folder
from foveate.progress import say

#: The file that is locked.
LOCK = ".foveate-lock"
_NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL})
_TRIES = 1000


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, after waiting until no other writer holds it. The folder is made if it does not exist,
    and removed again if it was made here and is empty at the end.

    Raises:
        CheckpointError: the lock's file is not a regular one.
        OSError: the folder cannot be made or written to.
    """
    number, new = _hold(folder)
    try:
        yield
    finally:
        with suppress(OSError):  # another writer is putting files there
            if new and os.listdir(folder) == [LOCK]:
                (folder / LOCK).unlink()
                for each in reversed(new):
                    each.rmdir()
        flock = _flock()
        if flock is not None:
            with suppress(OSError):  # it may not be locked; unlocked, for a forked process may have the descriptor too
                flock.flock(number, flock.LOCK_UN)
        os.close(number)


def _hold(folder: Path) -> tuple[int, list[Path]]:
    """The descriptor that holds the lock, and the folders that were made for it."""
    file = folder / LOCK
    for _ in range(_TRIES):
        new = make_folder(folder)
        try:
            number = _open(file, folder)
        except FileNotFoundError:
            continue  # another writer made the folder, failed, and removed it
        try:
            _wait(number, folder)
            if _is_same(number, file):
                return number, new
        except BaseException:
            os.close(number)
            raise
        os.close(number)
    raise CheckpointError(f"{folder} is made and removed by others all the time")


def _open(file: Path, folder: Path) -> int:
    flags = os.O_RDWR | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
    try:
        number = os.open(file, flags | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError:
        number = os.open(file, flags)
    else:
        with suppress(OSError):  # with the permissions of the folder, whatever the umask of this process
            file.chmod(folder.stat().st_mode & 0o666)
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise CheckpointError(f"{file} is not a regular file: it cannot be locked")
    return number


def _flock() -> Any:
    try:
        return importlib.import_module("fcntl")
    except ImportError:
        return None


def _wait(number: int, folder: Path) -> None:
    fcntl = _flock()
    if fcntl is None:
        _warn_without(folder, "this system has no flock")
        return
    try:
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for another save to {folder}")
            fcntl.flock(number, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        _warn_without(folder, str(error))


def _warn_without(folder: Path, why: str) -> None:
    warnings.warn(
        f"{folder} cannot be locked ({why}): nothing else may save to it meanwhile", RuntimeWarning, stacklevel=2
    )


def _is_same(number: int, file: Path) -> bool:
    """Whether a descriptor is of the file that has the name now, and not of a file that was removed meanwhile."""
    try:
        return os.path.samestat(os.fstat(number), file.stat())
    except FileNotFoundError:
        return False
