"""Sensors on folders made for the test, and sensors that die, lie, are stuck or hang."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from foveate.errors import DataError
from foveate.runtime.readings import UNITS, Reading, Sensor
from foveate.runtime.sensors.machine import Pressure, machine_sensors, process_memory
from foveate.runtime.sensors.power import Nvml, Powercap, power_sensor
from foveate.runtime.sensors.watched import WatchedSensor, read_all


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def _write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def _psi(total: int, average: float = 0.0) -> str:
    rest = "avg60=0.00 avg300=0.00"
    return f"some avg10={average:.2f} {rest} total={total}\nfull avg10=0.00 {rest} total=0\n"


def test_pressure_is_the_share_of_time_between_two_readings(tmp_path: Path) -> None:
    clock, file = Clock(), tmp_path / "proc/pressure/cpu"
    _write(file, _psi(1_000_000, 23.5))
    sensor = Pressure("cpu", tmp_path, clock)
    assert sensor() == 0.235
    clock.now = 2.0
    _write(file, _psi(1_500_000))
    assert sensor() == 0.25
    clock.now = 3.0
    _write(file, _psi(9_500_000))  # the kernel adds in steps: never more than all of the time
    assert sensor() == 1.0


def test_pressure_of_the_control_group_comes_first(tmp_path: Path) -> None:
    _write(tmp_path / "proc/pressure/memory", _psi(0, 50))
    _write(tmp_path / "proc/self/cgroup", "0::/app/inner\n")
    _write(tmp_path / "sys/fs/cgroup/app/inner/memory.pressure", _psi(0, 10))
    assert Pressure("memory", tmp_path)() == 0.1
    _write(tmp_path / "proc/self/cgroup", "0::/\n")
    assert Pressure("memory", tmp_path)() == 0.5


def test_pressure_that_is_not_there_says_so(tmp_path: Path) -> None:
    found = Pressure("cpu", tmp_path)()
    assert isinstance(found, str)
    assert "cannot be read" in found
    _write(tmp_path / "proc/pressure/cpu", "nonsense\n")
    assert "is not a file of pressure" in str(Pressure("cpu", tmp_path)())


def _package(root: Path, name: str, energy: int, most: int = 1 << 40) -> None:
    _write(root / f"sys/class/powercap/{name}/energy_uj", f"{energy}\n")
    _write(root / f"sys/class/powercap/{name}/max_energy_range_uj", f"{most}\n")


def test_watts_are_energy_over_time_of_all_packages(tmp_path: Path) -> None:
    clock = Clock()
    sensor = Powercap(tmp_path, clock)
    assert "there is no package" in str(sensor())
    _package(tmp_path, "intel-rapl:0", 100_000_000)
    _package(tmp_path, "intel-rapl:1", 50_000_000, most=60_000_000)
    _package(tmp_path, "intel-rapl:0:0", 7)  # a part of a package, which counts already
    assert "only once" in str(sensor())
    clock.now = 2.0
    _package(tmp_path, "intel-rapl:0", 160_000_000)
    _package(tmp_path, "intel-rapl:1", 9_999_999, most=60_000_000)  # the counter went round
    assert sensor() == pytest.approx((60 + 20) / 2)
    clock.now = 2.01
    assert sensor() == pytest.approx(40)  # too soon to divide by


def test_counters_that_only_root_may_read_are_unavailable(tmp_path: Path) -> None:
    _write(tmp_path / "sys/class/powercap/intel-rapl:0/name", "package-0")
    found = Powercap(tmp_path)()
    assert isinstance(found, str)
    assert "cannot be read" in found


def _nvml(milliwatts: list[int], error: Exception | None = None) -> Any:
    def power(handle: int) -> int:
        if error is not None:
            raise error
        return milliwatts[handle]

    return SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: len(milliwatts),
        nvmlDeviceGetHandleByIndex=lambda i: i,
        nvmlDeviceGetPowerUsage=power,
    )


def test_devices_are_added_and_errors_are_reasons(tmp_path: Path) -> None:
    assert Nvml(_nvml([30_000, 12_500]))() == pytest.approx(42.5)
    assert "no NVIDIA device" in str(Nvml(_nvml([]))())
    assert "driver gone" in str(Nvml(_nvml([1], RuntimeError("driver gone")))())
    assert power_sensor(tmp_path, _nvml([45_000])).read() == pytest.approx(45.0)
    both = power_sensor(tmp_path, _nvml([])).read()
    assert isinstance(both, str)
    assert "powercap" in both
    assert "NVIDIA" in both


def test_this_machine_answers_every_signal_with_a_value_or_a_reason() -> None:
    for signal, sensor in machine_sensors().items():
        found = sensor.read()
        assert sensor.signal == signal
        assert (isinstance(found, str) and found) or (isinstance(found, float) and found >= 0)
    assert process_memory() > 1 << 20


def _poll(sensor: WatchedSensor, now: float) -> Reading:
    return read_all([sensor], now, patience=5.0)[sensor.sensor.signal]


def _raises() -> float:
    raise OSError("the bus is gone")


@pytest.mark.parametrize(
    ("read", "says"),
    [
        (_raises, "it raised OSError: the bus is gone"),
        (lambda: "not on this machine", "not on this machine"),
        (lambda: math.nan, "not a finite number"),
        (lambda: -3.0, "not a finite number of at least 0"),
        (lambda: None, "it raised TypeError"),
        (lambda: "", "it gave no reason"),
    ],
)
def test_a_sensor_that_dies_or_lies_has_a_fault(read: Callable[[], float], says: str) -> None:
    watched = WatchedSensor(Sensor(signal="power", read=read))
    assert says in _poll(watched, 1.0).fault(1.0, 2.0)
    watched.close()


def test_a_sensor_that_is_stuck_is_a_fault_once_it_has_been_for_long() -> None:
    values = iter([40.0, 41.0, *[41.0] * 9, 42.0])
    watched = WatchedSensor(Sensor(signal="power", read=lambda: next(values), frozen_after=5.0))
    faults = [_poll(watched, float(now)).fault(now, 2.0) for now in range(12)]
    assert faults[:7] == [""] * 7
    assert faults[7] == "its value (=41) has not changed for 6.0 s"
    assert faults[11] == ""
    watched.close()


def test_a_sensor_that_hangs_grows_old_and_harms_nobody() -> None:
    release, calls = threading.Event(), []

    def read() -> float:
        calls.append(1)
        if len(calls) > 1:
            release.wait(10)
        return 1.0

    watched = WatchedSensor(Sensor(signal="queue_wait", read=read))
    other = WatchedSensor(Sensor(signal="load", read=lambda: 0.5))
    assert read_all([watched, other], 0.0, patience=5.0)["queue_wait"].value == 1.0
    for now in (1.0, 2.0, 3.0):
        found = read_all([watched, other], now, patience=0.01)
        assert found["queue_wait"].at == 0.0
    assert "3.0 s old" in found["queue_wait"].fault(3.0, 2.0)
    assert len(calls) == 2  # it is not asked again while it hangs
    watched.close()
    release.set()
    other.close()


def test_a_sensor_that_never_answered_is_unavailable() -> None:
    release = threading.Event()
    watched = WatchedSensor(Sensor(signal="power", read=lambda: float(release.wait(10))))
    assert "has not answered" in read_all([watched], 0.0, patience=0.01)["power"].reason
    release.set()
    watched.close()


def test_readings_have_a_value_or_a_reason() -> None:
    with pytest.raises(DataError):
        Reading()
    with pytest.raises(DataError):
        Reading(value=0.0, reason="unavailable")
    with pytest.raises(DataError, match="signal"):
        Sensor(signal="heat", read=lambda: 1.0)
    with pytest.raises(DataError, match="not a function"):
        Sensor(signal="power", read=3.0)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="frozen_after"):
        Sensor(signal="power", read=lambda: 1.0, frozen_after=0)
    assert set(UNITS) >= {"queue_wait", "power", "memory"}
