"""What a piece of work takes of this process: seconds, processor seconds, and memory.

Memory is counted as `foveate bench calibrate` counts it: the highest resident size during the work, less what the
process had when the meter was made. A script makes the meter after its imports and before it loads a model.
"""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Meter:
    """The sums over all pieces of work.

    Attributes:
        seconds, seconds_cpu: wall time and processor time of all threads.
        peak: bytes.
    """

    def __init__(self) -> None:
        gc.collect()
        self.seconds = self.seconds_cpu = 0.0
        self.peak = 0
        self._base = _status("VmRSS") or _highest()

    @contextmanager
    def work(self) -> Iterator[None]:
        """Count what happens in a `with` block."""
        gc.collect()
        _reset_highest()
        began, began_cpu = time.perf_counter(), _processor_seconds()
        yield
        self.seconds += time.perf_counter() - began
        self.seconds_cpu += _processor_seconds() - began_cpu
        self.peak = max(self.peak, _highest() - self._base)

    def answer(self) -> dict[str, float]:
        """All of it, as a script's answer has it."""
        return {"seconds": self.seconds, "seconds_cpu": self.seconds_cpu, "peak": self.peak}


def _processor_seconds() -> float:
    """Of this process and of its children that have ended."""
    return sum(os.times()[:4])


def _status(key: str) -> int:
    """Bytes that the system reports of this process, or 0 where it does not."""
    file = Path("/proc/self/status")
    lines = file.read_text().splitlines() if file.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), 0)


def _highest() -> int:
    """The highest resident size so far."""
    highest = _status("VmHWM")
    if highest:
        return highest
    import resource

    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024


def _reset_highest() -> None:
    """Where the system cannot, the highest size since the start of the process counts."""
    file = Path("/proc/self/clear_refs")
    if os.access(file, os.W_OK):
        file.write_text("5")
