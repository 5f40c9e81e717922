"""The data of a calibration that one process makes alone: each batch once in each pass, in order."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import Any

from foveate.calibrate.resuming import ResumeFile
from foveate.collect.collector import Collector

#: Batches between two writes of the resume file; the first ones come sooner, after 1, 2, 4 and 8.
_SAVE_EVERY = 16


class Stream:
    """Hands out the batches, and writes the resume file as statistics grow.

    Attributes:
        count: how many batches there are; None if that is not known.
        done: how many of them the collector has seen before.
    """

    def __init__(
        self, batches: Iterable[Any], count: int | None, collector: Collector, resume: ResumeFile | None, again: bool
    ) -> None:
        """
        Args:
            batches: are iterated over once.
            count: their number.
            collector: its statistics are written to the file.
            resume: the file; none is written if not given.
            again: whether there are further passes, for which the batches are kept.
        """
        self.count, self.done = count, collector.batches
        self._batches, self._collector, self._resume, self._again = batches, collector, resume, again
        self._kept: list[Any] = []

    @property
    def left(self) -> int | None:
        """How many batches are to be seen; None if that is not known."""
        return None if self.count is None else self.count - self.done

    @property
    def places(self) -> Iterable[int]:
        """The places of the batches in the data, when the first pass is made."""
        return range(self._collector.batches)

    def first_pass(self) -> Iterator[tuple[int, Any]]:
        """The batches with their places. Before the next one is asked for, each is seen, unless it is done."""
        for index, batch in enumerate(self._batches):
            if self._again:
                self._kept.append(batch)
            yield index, batch
            if index >= self.done and _saved_after(index + 1):
                self._write()
        if not _saved_after(self._collector.batches):
            self._write()

    def further_pass(self, names: Collection[str]) -> Iterator[tuple[int, Any]]:
        """The batches again, with their places."""
        yield from enumerate(self._kept)

    def _write(self) -> None:
        if self._resume is not None:
            self._resume.write(self._collector.state())


def _saved_after(batches: int) -> bool:
    return batches % _SAVE_EVERY == 0 or batches in (1, 2, 4, 8)
