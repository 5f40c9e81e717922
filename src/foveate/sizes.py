"""Sizes in bytes and times, as people write them: reading and printing them."""

from __future__ import annotations

import re

from foveate.errors import BudgetError

_UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "KIB": 1 << 10,
    "MIB": 1 << 20,
    "GIB": 1 << 30,
    "K": 1 << 10,
    "M": 1 << 20,
    "G": 1 << 30,
}
_SECONDS = {"": 1.0, "S": 1.0, "MS": 1e-3, "US": 1e-6}


def parse_bytes(size: int | str) -> int:
    """Bytes of `1234`, `"800MiB"`, `"6GB"` (decimal) or `"6G"` (binary); raises `BudgetError` for anything else."""
    if isinstance(size, int):
        return size
    match = re.fullmatch(r"\s*([0-9]{0,30}\.?[0-9]{1,30})\s*([A-Za-z]*)\s*", size) if isinstance(size, str) else None
    if not match or match[2].upper() not in _UNITS:
        raise BudgetError(f"size (={size!r}) is not a number of bytes like 800MiB, 6GB or 123456")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def parse_seconds(time: float | str) -> float:
    """Seconds of `0.03`, `"30ms"`, `"200us"` or `"1.5s"`; raises `BudgetError` for anything else."""
    if isinstance(time, (int, float)) and not isinstance(time, bool):
        return float(time)
    match = re.fullmatch(r"\s*([0-9]{0,30}\.?[0-9]{1,30})\s*([A-Za-z]*)\s*", time) if isinstance(time, str) else None
    if not match or match[2].upper() not in _SECONDS:
        raise BudgetError(f"time (={time!r}) is not a number of seconds like 30ms, 200us or 0.03")
    return float(match[1]) * _SECONDS[match[2].upper()]


def format_seconds(seconds: float) -> str:
    """`0.0312` -> `31.2 ms`."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if abs(seconds) >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us"


def format_bytes(count: float) -> str:
    """`1234567` -> `1.18 MiB`."""
    for unit in ("B", "KiB", "MiB"):
        if abs(count) < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"
