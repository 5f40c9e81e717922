"""Reading files that may come from a stranger: only regular files, of bounded size, and JSON of bounded depth.

Symbolic links are followed, but must lead to a regular file. A named pipe, a device or a socket is refused at once,
without waiting for data.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

from foveate.errors import CheckpointError

#: How deep brackets may be nested in a JSON file of foveate, or in a configuration.
_DEEPEST = 100


def open_regular(path: Path, most: int | None = None) -> BinaryIO:
    """Open a file to read, unbuffered.

    Args:
        path: where it is.
        most: the greatest size in bytes; any if not given.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is not a regular file, is too large, or cannot be opened.
    """
    # without O_NONBLOCK, opening a named pipe waits for a writer
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0) | getattr(os, "O_BINARY", 0)
    try:
        number = os.open(path, flags | getattr(os, "O_CLOEXEC", 0))
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    try:
        about = os.fstat(number)
        if not stat.S_ISREG(about.st_mode):
            raise CheckpointError(f"{path} is not a regular file")
        if most is not None and about.st_size > most:
            raise CheckpointError(f"{path} has {about.st_size:,} bytes, and at most {most:,} are read")
        return os.fdopen(number, "rb", buffering=0)
    except BaseException:
        os.close(number)
        raise


def read_regular(path: Path, most: int) -> bytes:
    """The bytes of a file; arguments and errors as for `open_regular`."""
    with open_regular(path, most) as file:
        try:
            # at most one byte more than allowed is read, for a file may grow while it is read
            parts, left = [], most + 1
            while left and (part := file.read(min(left, 1 << 20))):
                parts.append(part)
                left -= len(part)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not left:
        raise CheckpointError(f"{path} has more than {most:,} bytes")
    return b"".join(parts)


def parse_json(text: bytes) -> Any:
    """A JSON value with brackets at most 100 deep, so that recursive code can walk it.

    Raises:
        ValueError: it is not JSON, or nested too deep.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    layer, depth = [value], 0
    while layer:
        if depth > _DEEPEST:
            raise ValueError(f"it is nested more than {_DEEPEST} deep")
        inner = [each for each in layer if isinstance(each, (dict, list))]
        layer = [v for each in inner for v in (each.values() if isinstance(each, dict) else each)]
        depth += 1
    return value
