"""Sensors that are read on threads of their own, so that one that hangs, raises or is stuck harms nobody.

Each sensor has a thread that reads it when it is asked to. The asker waits a short time for all answers together. One
that has not answered keeps its last reading, which grows old: the controller holds, and then takes the safe index.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

from foveate.runtime.readings import Reading, Sensor


class WatchedSensor:
    """One sensor with its thread.

    Attributes:
        sensor: what is read.
        latest: the newest reading; its time is that of the request which it answers.
    """

    def __init__(self, sensor: Sensor) -> None:
        self.sensor = sensor
        self.latest: Reading | None = None
        self._wake, self._answered = threading.Event(), threading.Event()
        self._answered.set()
        self._asked_at = 0.0
        self._changed: tuple[float, float] | None = None
        self._closed = False
        self._thread: threading.Thread | None = None

    def ask(self, now: float) -> None:
        """Have the sensor read, unless it is still busy with an earlier request."""
        if not self._answered.is_set() or self._closed:
            return
        if self._thread is None:
            name = f"foveate-sensor-{self.sensor.signal}"
            self._thread = threading.Thread(target=self._run, name=name, daemon=True)
            self._thread.start()
        self._asked_at = now
        self._answered.clear()
        self._wake.set()

    def answer(self, seconds: float, now: float) -> Reading:
        """The newest reading, after waiting for the answer for at most so many seconds.

        Args:
            seconds: of the machine's clock.
            now: the time of the manager's clock.
        """
        self._answered.wait(max(seconds, 0.0))
        if self.latest is not None:
            return self.latest
        return Reading(reason=f"it has not answered since it was asked first ({now - self._asked_at:.1f} s)", at=now)

    def close(self) -> None:
        """End the thread, or leave it to end by itself if it hangs."""
        self._closed = True
        self._wake.set()

    def _run(self) -> None:
        while True:
            self._wake.wait()
            self._wake.clear()
            if self._closed:
                return
            self.latest = self._read(self._asked_at)
            self._answered.set()

    def _read(self, at: float) -> Reading:
        try:
            value = self.sensor.read()
            if isinstance(value, str):
                return Reading(reason=value or "it gave no reason", at=at)
            value = float(value)
        except Exception as error:  # a sensor may be anybody's code
            return Reading(reason=f"it raised {type(error).__name__}: {error}", at=at)
        if self._changed is None or value != self._changed[0]:
            self._changed = (value, at)
        limit, rests = self.sensor.frozen_after, at - self._changed[1]
        if limit is not None and rests > limit:
            return Reading(reason=f"its value (={value:g}) has not changed for {rests:.1f} s", at=at)
        return Reading(value=value, at=at)


def read_all(sensors: Sequence[WatchedSensor], now: float, patience: float = 0.05) -> dict[str, Reading]:
    """Read all sensors at once, by signal.

    Args:
        sensors: one for each signal.
        now: the time of the manager's clock, which the readings get.
        patience: seconds to wait for all answers together, of the machine's clock.
    """
    deadline = time.monotonic() + patience
    for one in sensors:
        one.ask(now)
    return {one.sensor.signal: one.answer(deadline - time.monotonic(), now) for one in sensors}
