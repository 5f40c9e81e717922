"""The sensor of power: the processor's energy counters (powercap), and NVIDIA's management library.

Energy counters of processors may be read by root only, and virtual machines have none. Then power is unavailable, and
never 0 W.

Source: Linux, Documentation/power/powercap/powercap.rst; NVML, nvmlDeviceGetPowerUsage.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from foveate.runtime.readings import Sensor

#: Seconds after which a power that has not changed at all is a fault: counters move all the time.
_FROZEN_AFTER = 5.0


class Powercap:
    """Watts of all processor packages, from their energy counters between two calls.

    Args:
        root: where `sys` is.
        clock: gives seconds.
    """

    def __init__(self, root: Path = Path("/"), clock: Callable[[], float] = time.monotonic) -> None:
        self._folder, self._clock = root / "sys/class/powercap", clock
        self._before: tuple[dict[str, int], float] | None = None
        self._last: float | None = None

    def __call__(self) -> float | str:
        """Watts, or why there are none."""
        # a zone `intel-rapl:0` is a package; `intel-rapl:0:0` is a part of it
        zones = [z for z in sorted(self._folder.glob("*:*")) if z.name.count(":") == 1]
        if not zones:
            return f"there is no package in {self._folder}"
        try:
            counters = {zone.name: int((zone / "energy_uj").read_text()) for zone in zones}
            ranges = {zone.name: int((zone / "max_energy_range_uj").read_text()) for zone in zones}
        except OSError as error:
            return f"the energy counters of {self._folder} cannot be read: {error.strerror or error}"
        except ValueError:
            return f"an energy counter of {self._folder} is not a number"
        now, before = self._clock(), self._before
        if before is not None and now - before[1] < 0.02 and self._last is not None:
            return self._last
        self._before = (counters, now)
        if before is None or set(before[0]) != set(counters) or now <= before[1]:
            return "the energy counters have been read only once"
        spent = sum((counters[n] - before[0][n]) % (ranges[n] + 1) for n in counters)
        self._last = spent * 1e-6 / (now - before[1])
        return self._last


class Nvml:
    """Watts of all NVIDIA devices, by the package nvidia-ml-py if it is installed.

    Args:
        library: the module `pynvml`; imported if not given.
    """

    def __init__(self, library: Any = None) -> None:
        self._library = library
        self._devices: list[Any] | None = None

    def __call__(self) -> float | str:
        """Watts, or why there are none."""
        if self._library is None:
            try:
                self._library = import_module("pynvml")
            except ImportError:
                return "the package nvidia-ml-py is not installed"
        try:
            if self._devices is None:
                self._library.nvmlInit()
                count = self._library.nvmlDeviceGetCount()
                self._devices = [self._library.nvmlDeviceGetHandleByIndex(i) for i in range(count)]
            watts = [self._library.nvmlDeviceGetPowerUsage(device) * 1e-3 for device in self._devices]
        except Exception as error:  # NVML's own errors derive from nothing that is known here
            return f"NVML: {error}"
        return sum(watts) if watts else "there is no NVIDIA device"


def power_sensor(root: Path = Path("/"), library: Any = None) -> Sensor:
    """The power of processors and of NVIDIA devices together, of those that are available.

    Args:
        root: where `sys` is.
        library: the module `pynvml`; imported if not given.
    """
    packages, devices = Powercap(root), Nvml(library)

    def read() -> float | str:
        found = (packages(), devices())
        watts = [value for value in found if isinstance(value, float)]
        if watts:
            return sum(watts)
        return "; ".join(str(value) for value in found)

    return Sensor(signal="power", read=read, frozen_after=_FROZEN_AFTER)
