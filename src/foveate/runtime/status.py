"""The status file of a running manager, and how `foveate top` finds and trusts it.

A manager writes a JSON file named by its process, `<pid>-<number>.json`, in a folder of the user's own, and replaces it
as a whole. A reader takes only regular files that belong to the user, of processes that live. Nothing is executed, and
nothing of the process is touched.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from foveate.errors import CheckpointError, FoveateError
from foveate.files import parse_json, read_regular, replacing

_LARGEST = 8 << 20


def status_folder() -> Path:
    """The folder of status files: in `XDG_RUNTIME_DIR` if that is set, else in the user's cache."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    return Path(runtime) / "foveate" if runtime else Path.home() / ".cache" / "foveate" / "run"


def private_folder(folder: Path) -> Path:
    """Make the folder, for its user alone (mode 0700), and return it.

    Raises:
        FoveateError: it is not a folder, or belongs to somebody else, or others may write in it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    about = folder.lstat()
    if not stat.S_ISDIR(about.st_mode):
        raise FoveateError(f"{folder} is not a folder")
    if about.st_uid != os.getuid():
        raise FoveateError(f"{folder} belongs to another user")
    if stat.S_IMODE(about.st_mode) & 0o077:
        folder.chmod(0o700)
    return folder


def write_status(file: Path, status: Mapping[str, Any]) -> None:
    """Replace a status file as a whole; raises `OSError` if it cannot be written."""
    with replacing(file) as temporary:
        temporary.write_text(json.dumps(status, allow_nan=False), encoding="utf-8")


def read_status(file: Path) -> dict[str, Any] | None:
    """The status in a file; None if its process has ended.

    Raises:
        FoveateError: the file is not this user's, or not a status file.
    """
    try:
        about = file.lstat()
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(about.st_mode) or about.st_uid != os.getuid():
        raise FoveateError(f"{file} is not a regular file of this user")
    try:
        found = parse_json(read_regular(file, _LARGEST))
        pid, started = int(found["pid"]), float(found["started"])
    except FileNotFoundError:
        return None
    except (CheckpointError, KeyError, TypeError, ValueError) as error:
        raise FoveateError(f"{file} is not a status file: {error}") from error
    return found if _lives(pid, started) else None


def find_status(folder: Path, pid: int | None = None) -> dict[str, Any]:
    """The status of the one manager that runs, or of the newest of a process.

    Args:
        folder: where status files are.
        pid: the process; any if not given.

    Raises:
        FoveateError: there is none, or there are managers in several processes and `pid` is not given.
    """
    found = []
    for file in sorted(folder.glob("*.json")) if folder.is_dir() else []:
        if pid is not None and file.name.split("-")[0] != str(pid):
            continue
        status = read_status(file)
        if status is not None:
            found.append(status)
    processes = sorted({status["pid"] for status in found})
    if not found:
        who = "no process of this user" if pid is None else f"process {pid}"
        raise FoveateError(f"{who} runs a RuntimeManager: there is no status file of it in {folder}")
    if len(processes) > 1:
        raise FoveateError(f"several processes run a RuntimeManager: give one of {', '.join(map(str, processes))}")
    newest: dict[str, Any] = max(found, key=lambda status: float(status.get("updated", 0.0)))
    return newest


def process_start(pid: int) -> float:
    """The time at which a process started, in seconds since 1970; tells it from a later one of the same number."""
    return float(psutil.Process(pid).create_time())


def _lives(pid: int, started: float) -> bool:
    try:
        return abs(process_start(pid) - started) < 2.0
    except (psutil.NoSuchProcess, psutil.AccessDenied, ValueError):
        return False
