"""Progress of long work: a Rich bar where Rich is installed and stderr is a terminal, lines in the log elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

Item = TypeVar("Item")
log = logging.getLogger("foveate")


def track(items: Iterable[Item], label: str, *, total: int | None = None, show: bool = True) -> Iterator[Item]:
    """Yield the items, and show how many are done and how long the rest will take.

    Args:
        items: what to iterate over.
        label: what the work is called.
        total: how many items there are; their length if not given.
        show: False shows nothing.
    """
    if total is None:
        total = len(items) if isinstance(items, Sized) else None
    if show and sys.stderr.isatty():
        try:
            from rich.console import Console
            from rich.progress import track as rich_track
        except ImportError:
            pass
        else:
            yield from rich_track(items, label, total=total, console=Console(stderr=True), transient=True)
            return
    started = last_shown = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if show and now - last_shown > 10:
            left = f", {(now - started) / done * (total - done):.0f} s left" if total and done else ""
            log.info("%s: %d%s%s", label, done, f" of {total}" if total else "", left)
            last_shown = now
        yield item


def say(text: str) -> None:
    """Print a line about progress: to the log if its level is INFO or lower, else to stderr if no level was set."""
    if log.isEnabledFor(logging.INFO):
        log.info(text)
    elif log.level == logging.NOTSET:
        print(text, file=sys.stderr)
