"""Progress on long work: a Rich bar on stderr where Rich is installed and a person is looking, log lines elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

Item = TypeVar("Item")
log = logging.getLogger("foveate")


def track(items: Iterable[Item], label: str, *, total: int | None = None, show: bool = True) -> Iterator[Item]:
    """Yield the items, showing how far it is and how long it will take."""
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
    started = said = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if show and now - said > 10:
            left = f", {(now - started) / done * (total - done):.0f} s left" if total and done else ""
            log.info("%s: %d%s%s", label, done, f" of {total}" if total else "", left)
            said = now
        yield item


def say(text: str) -> None:
    """A line for whoever waits: to the log where somebody listens, else to stderr; nowhere if it is to be quiet."""
    if log.isEnabledFor(logging.INFO):
        log.info(text)
    elif log.level == logging.NOTSET:
        print(text, file=sys.stderr)
