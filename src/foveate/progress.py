"""Progress of long work: a Rich bar where Rich is installed and stderr is a terminal, lines in the log elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any, TypeVar

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


class Bar:
    """One bar for work of several phases, and the seconds that each phase took.

    What a phase will take is expected beforehand. Where it has done a tenth of its items, its own pace is believed
    instead. On a terminal the bar is shown by Rich where that is installed; elsewhere a line goes to the log every ten
    seconds.

    Attributes:
        spent: the seconds of each phase so far.

    Example:
        >>> bar = Bar("quantizing", show=False)
        >>> bar.expect({"reading": 2.0, "rounding": 6.0})
        >>> for item in bar.track("reading", range(4)): ...
        >>> bar.close()
    """

    def __init__(self, label: str, *, show: bool = True, clock: Callable[[], float] = time.monotonic) -> None:
        """
        Args:
            label: what the whole work is called.
            show: False shows nothing.
            clock: gives the time in seconds.
        """
        self.spent: dict[str, float] = {}
        self._label, self._show, self._clock = label, show, clock
        self._expected: dict[str, float] = {}
        self._done: dict[str, float] = {}  # the share of each phase that was begun
        self._last_line = clock()
        self._rich: Any = None

    def expect(self, seconds: Mapping[str, float]) -> None:
        """Say how long each phase takes, in the order of the phases."""
        self._expected = {phase: max(value, 1e-9) for phase, value in seconds.items()}

    @property
    def expected(self) -> float:
        """Seconds that all phases were expected to take; 0 while nothing is expected."""
        return sum(self._expected.values())

    def note(self, phase: str, seconds: float) -> None:
        """Add seconds that were measured elsewhere, as those of a part of a phase."""
        self.spent[phase] = self.spent.get(phase, 0.0) + seconds

    @property
    def share(self) -> float:
        """The share of all expected work that is done, 0 to 1; 0 while nothing is expected."""
        total = sum(self._expected.values())
        done = sum(seconds * self._done.get(phase, 0.0) for phase, seconds in self._expected.items())
        return done / total if total else 0.0

    @property
    def left(self) -> float | None:
        """Seconds that the rest takes; None while nothing is expected."""
        if not self._expected:
            return None
        left = 0.0
        for phase, seconds in self._expected.items():
            done = self._done.get(phase, 0.0)
            whole = self.spent[phase] / done if done >= 0.1 else seconds
            left += whole * (1 - done)
        return left

    def track(
        self, phase: str, items: Iterable[Item], *, total: int | None = None, sizes: Sequence[float] | None = None
    ) -> Iterator[Item]:
        """Yield the items of a phase. A phase that is tracked again begins anew, and its seconds add up.

        Args:
            phase: its name.
            items: what to iterate over.
            total: how many items there are; their length if not given.
            sizes: how much work each item is, in any unit; all alike if not given.
        """
        if total is None:
            total = len(items) if isinstance(items, Sized) else None
        whole = sum(sizes) if sizes is not None else float(total or 0)
        done, before, began = 0.0, self.spent.get(phase, 0.0), self._clock()
        self._done[phase] = 0.0
        try:
            for number, item in enumerate(items):
                self._draw(phase)
                yield item
                done += 1.0 if sizes is None else sizes[number]
                self._done[phase] = min(done / whole, 1.0) if whole else 0.0
                self.spent[phase] = before + self._clock() - began
        finally:
            self.spent[phase] = before + self._clock() - began
        self._done[phase] = 1.0

    def close(self) -> None:
        """Remove the bar from the terminal."""
        if self._rich is not None:
            self._rich[0].stop()
            self._rich = None

    def _draw(self, phase: str) -> None:
        if not self._show:
            return
        left = self.left
        text = f"{self._label}: {phase}" + ("" if left is None else f", {in_words(left)} left")
        if sys.stderr.isatty() and self._on_terminal(text):
            return
        if self._clock() - self._last_line > 10:
            log.info("%s, %.0f %% done", text, 100 * self.share)
            self._last_line = self._clock()

    def _on_terminal(self, text: str) -> bool:
        """Draw with Rich; False where that is not installed."""
        if self._rich is None:
            try:
                from rich.console import Console
                from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
            except ImportError:
                return False
            columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
            shown = Progress(*columns, console=Console(stderr=True), transient=True)
            shown.start()
            self._rich = (shown, shown.add_task(text, total=1.0))
        shown, task = self._rich
        shown.update(task, description=text, completed=self.share)
        return True


def in_words(seconds: float) -> str:
    """Seconds as text: `45 s`, `12 min`, `3.5 h`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def say(text: str) -> None:
    """Print a line about progress: to the log if its level is INFO or lower, else to stderr if no level was set."""
    if log.isEnabledFor(logging.INFO):
        log.info(text)
    elif log.level == logging.NOTSET:
        print(text, file=sys.stderr)
