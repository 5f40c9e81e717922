"""Sensors of the machine: memory of the process, and the pressure on its CPUs and memory.

Pressure is the share of time in which at least one process waited, from the kernel's own totals between two readings.
That is newer than the average over ten seconds that the kernel keeps.

Source: Linux, Documentation/accounting/psi.rst.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import psutil

from foveate.runtime.readings import Sensor
from foveate.runtime.sensors.power import power_sensor

_ROOT = Path("/")


def process_memory() -> float:
    """Resident bytes of this process, shared pages included."""
    return float(psutil.Process().memory_info().rss)


class Pressure:
    """The share of time in which some process waited for a resource, between two calls; the first gives `avg10`.

        Pressure("cpu")()  # 0.12, or a sentence that says why there is none

    Args:
        resource: `cpu`, `memory` or `io`.
        root: where `proc` and `sys` are.
        clock: gives seconds.
    """

    def __init__(self, resource: str, root: Path = _ROOT, clock: Callable[[], float] = time.monotonic) -> None:
        self._file = _pressure_file(resource, root)
        self._clock = clock
        self._before: tuple[float, float] | None = None

    def __call__(self) -> float | str:
        """The share, 0 to 1, or why there is none."""
        try:
            line = next(line for line in self._file.read_text().splitlines() if line.startswith("some"))
            fields = dict(word.split("=", 1) for word in line.split()[1:])
            total, average = float(fields["total"]) * 1e-6, float(fields["avg10"]) / 100
        except OSError as error:
            return f"{self._file} cannot be read: {error.strerror or error}"
        except (StopIteration, KeyError, ValueError):
            return f"{self._file} is not a file of pressure stall information"
        now, before = self._clock(), self._before
        if before is not None and now - before[1] < 0.02:
            return average  # too short a time to divide by
        self._before = (total, now)
        return average if before is None else min(max((total - before[0]) / (now - before[1]), 0.0), 1.0)


def _pressure_file(resource: str, root: Path) -> Path:
    """The file of this process's control group (version 2), if it is not the root group; else the machine's."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("0::/") and len(line) > len("0::/"):
            file = root / "sys/fs/cgroup" / line[4:] / f"{resource}.pressure"
            if file.is_file():
                return file
    return root / "proc/pressure" / resource


def machine_sensors(root: Path = _ROOT) -> dict[str, Sensor]:
    """The sensors of this machine, by signal; each says itself whether it is available.

    Args:
        root: where `proc` and `sys` are.
    """
    found = (
        Sensor(signal="memory", read=process_memory),
        Sensor(signal="cpu_pressure", read=Pressure("cpu", root)),
        Sensor(signal="memory_pressure", read=Pressure("memory", root)),
        power_sensor(root),
    )
    return {sensor.signal: sensor for sensor in found}
