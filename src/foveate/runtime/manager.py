"""RuntimeManager: watches the machine while a model runs, moves the model along a frontier, and comes back.

    sensors -> observation -> controller (pure) -> index -> levels of the model, between two passes

A thread of the manager's ticks; or the loop calls `manager.step()` itself. Every observation and decision can be logged
and replayed (`foveate.runtime.records`), and `foveate top` shows a running manager from its status file.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import nn

from foveate.allocate import frontier as frontier_of
from foveate.errors import FoveateError
from foveate.folder.known_frontier import known_frontier
from foveate.nn.registry import profile_of
from foveate.precision.frontiers import Frontier
from foveate.runtime.controller import Decision, Observation, State, step
from foveate.runtime.costs import known_costs
from foveate.runtime.limits import Limits
from foveate.runtime.options import ManagerOptions
from foveate.runtime.planes_on_disk import planes_along
from foveate.runtime.policy import Setup
from foveate.runtime.readings import Reading, Sensor
from foveate.runtime.records import Log
from foveate.runtime.sensors.machine import machine_sensors
from foveate.runtime.sensors.watched import WatchedSensor, read_all
from foveate.runtime.site_control import SiteControl, below, controlled
from foveate.runtime.status import private_folder, process_start, status_folder, write_status

#: Seconds from one status file to the next.
_STATUS_EVERY = 1.0
_NUMBERS = itertools.count()
_log = logging.getLogger("foveate")


@dataclass(frozen=True, kw_only=True)
class Move:
    """A change of the index: when (in seconds of the manager's clock), and the decision."""

    at: float
    decision: Decision

    def __str__(self) -> str:
        return f"{self.at:.2f} s: index {self.decision.before} -> {self.decision.index}, {self.decision.reason}"


class RuntimeManager:
    """Keeps a running model within limits by moving it along a frontier, and brings its precision back afterwards.

        with fv.RuntimeManager(model, limits=fv.Limits(queue_wait="200ms"), sensors={"queue_wait": queue.oldest}):
            for request in queue:
                model.generate(**request)

    Index 0 is the model as it stands, and the frontier goes on below it. A move takes effect between two passes of the
    outermost module, and moves no planes. Leaving the block puts back the map that was in force.

    Args:
        model: a quantized model. With its profile, unless `frontier` and `options.costs` are given.
        limits: what it may take.
        frontier: the chain to move along; if None, the one in force (`fv.apply` takes a frontier), or where that is a
            single map the one that the model's folder holds, or `fv.frontier(profile, 16)`. Of each map the lesser of
            its level and the level in force counts. What was measured of a frontier is what its indices cost.
        control: settings of single sites: `hold`, `floor`, `from_index`.
        sensors: functions (or `Sensor`s) for signals that only the caller knows, `queue_wait` and `load`, or in place
            of the machine's own. A function returns a number, or a sentence that says why there is none.
        options: how it works.

    Attributes:
        frontier: the chain that it moves along.
        setup: what the controller knows.
        moves: the last moves, the newest last.
        switches: how many moves there were.
        admits: whether new work may be admitted; False while memory is above its limit. A move frees memory where the
            model's planes come and go (`load(memory=)`), or `residency` is given; elsewhere a limit of memory only
            gates admission.

    Raises:
        FoveateError: the model is not quantized or has a manager already; `queue_wait` is limited and nobody reads it;
            the profile is needed and missing.
        SiteError: the frontier is of another model, or a pattern of `control` matches no site.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        limits: Limits,
        frontier: Frontier | None = None,
        control: SiteControl | None = None,
        sensors: Mapping[str, Callable[[], float | str] | Sensor] | None = None,
        options: ManagerOptions | None = None,
    ) -> None:
        if not isinstance(limits, Limits):
            raise FoveateError(f"limits (={limits!r}) are not fv.Limits, such as fv.Limits(queue_wait='200ms')")
        self._options = options or ManagerOptions()
        self._model_name = type(model).__name__
        self._sensors = _sensors(limits, sensors or {})
        self._levels = self._options.make_control(model)
        in_force = self._levels.chain() if frontier is None else None
        if in_force is not None and control is None:
            self.frontier = in_force
        else:
            chain = frontier or in_force or known_frontier(model) or frontier_of(profile_of(model))
            if chain[0] != self._levels.current():
                chain = below(self._levels.current(), chain)
            self.frontier = chain if control is None else controlled(chain, control)
        costs = self._options.costs or known_costs(model, self.frontier)
        self._residency: Callable[[int], None] | None = self._options.residency
        self._planes = planes_along(model, self.frontier) if limits.memory and self._residency is None else None
        if self._planes is not None:
            self._residency, costs = self._planes, replace(costs, resident=self._planes.resident)
        self.setup = Setup(
            limits=limits,
            costs=costs,
            policy=self._options.policy,
            floor=self._options.floor,
            frees_memory=self._residency is not None and bool(costs.resident),
        )
        if len(self.setup.costs) != len(self.frontier):
            raise FoveateError(
                f"the costs are of {len(self.setup.costs)} indices and the frontier has {len(self.frontier)} maps"
            )
        self.moves: deque[Move] = deque(maxlen=256)
        self.switches = 0
        self._state = State()
        self._refused = False
        self._readings: Mapping[str, Reading] = {}
        self._said: set[str] = set()
        self._spent, self._passes = 0.0, 0.0
        self._lock, self._stop = threading.RLock(), threading.Event()
        self._thread: threading.Thread | None = None
        self._log: Log | None = None
        self._status_file: Path | None = None
        self._status_at = -math.inf
        self._error: BaseException | None = None
        self._started = 0.0
        self._running = False

    @property
    def index(self) -> int:
        """The index on the frontier that was decided last; 0 is the best."""
        return self._state.index

    @property
    def admits(self) -> bool:
        """Whether new work may be admitted; False while memory is above its limit."""
        return self._state.admit

    @property
    def readings(self) -> Mapping[str, Reading]:
        """What the sensors said last, by signal."""
        return self._readings

    @property
    def expected_kl(self) -> float:
        """The mean KL of all passes so far that the costs predict, in nats; NaN before the first pass."""
        return self._spent / self._passes if self._passes else math.nan

    def start(self) -> RuntimeManager:
        """Put the frontier in force and begin to decide; `with` does it."""
        with self._lock:
            if self._running:
                raise FoveateError("the manager runs already")
            self._levels.start(self.frontier)
            self._running = True
            try:
                self._open_files()
            except BaseException:
                self.close()
                raise
        if self._options.background:
            self._thread = threading.Thread(target=self._run, name="foveate-runtime", daemon=True)
            self._thread.start()
        return self

    def close(self) -> None:
        """Stop deciding, and put back the map that was in force before `start`.

        Raises:
            FoveateError: the manager's thread ended with an error before; the error is its cause.
        """
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        with self._lock:
            if not self._running:
                return
            self._running = False
            for sensor in self._sensors:
                sensor.close()
            self._levels.withdraw()
            if self._planes is not None:
                try:
                    self._planes.end()
                except FoveateError as refusal:  # a floor that was raised meanwhile
                    _log.warning("the limit of memory stays lowered: %s", refusal)
            if self._log is not None:
                self._log.close()
            if self._status_file is not None:
                self._status_file.unlink(missing_ok=True)
        if self._error is not None:
            error, self._error = self._error, None
            raise FoveateError(f"the manager stopped deciding: {error}") from error

    def __enter__(self) -> RuntimeManager:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except FoveateError:
            if error is None:
                raise
            _log.exception("the manager stopped deciding before the loop failed")

    def step(self) -> Decision:
        """Read the sensors, decide, and carry the decision out; with `background` the manager's thread does it.

        Returns:
            The decision.

        Raises:
            FoveateError: the manager does not run.
        """
        with self._lock:
            if not self._running:
                raise FoveateError("the manager does not run: use it in a `with` block, or call start()")
            seen = self._observe()
            self._state, decision = step(self.setup, self._state, seen)
            self._spent += seen.passes * self.setup.costs.kl[decision.before]
            self._passes += seen.passes
            if self._log is not None:
                self._log.add(seen, decision)
            self._say(seen, decision)
            self._carry_out(decision, seen)
            if seen.now - self._status_at >= _STATUS_EVERY or decision.index != decision.before:
                self._write_status(seen.now)
            return decision

    def _observe(self) -> Observation:
        now = self._options.clock()
        readings = read_all(self._sensors, now)
        passes, seconds = self._levels.passes()
        if "latency" in self.setup.given and "latency" not in readings:
            if seconds is None:
                readings["latency"] = Reading(reason="no pass has ended yet", at=now)
            else:
                readings["latency"] = Reading(value=seconds, at=now)
        self._readings = readings
        refused, self._refused = self._refused, False
        return Observation(now=now, readings=readings, passes=passes, refused=refused)

    def _carry_out(self, decision: Decision, seen: Observation) -> None:
        """Move the model; planes are fetched before a rise, and given back after a fall."""
        if decision.index == self._levels.index:
            return
        rises, residency = decision.index < self._levels.index, self._residency
        if rises and residency is not None:
            try:
                residency(decision.index)
            except Exception as error:  # reading a file, or memory that is not there
                self._refused = True
                _log.warning("the planes of index %d could not be fetched: %s", decision.index, error)
                return
        self._levels.set_index(decision.index)
        self.switches += 1
        self.moves.append(Move(at=seen.now, decision=decision))
        if not rises and residency is not None:
            try:
                residency(decision.index)
            except Exception as error:  # the move itself is done, and what stays in memory is counted there
                _log.warning("memory beyond index %d could not be given back: %s", decision.index, error)

    def _say(self, seen: Observation, decision: Decision) -> None:
        """Warn once of each limit that nothing watches, and of each sensor's fault when it begins."""
        faults = {note.partition(":")[0]: note for note in decision.notes}
        for signal in self.setup.given:
            reading = seen.readings.get(signal)
            if signal in self._state.timers or signal == "latency" or reading is None or reading.value is not None:
                continue
            faults[signal] = f"{signal} is limited and cannot be watched: {reading.reason}"
        for signal, note in faults.items():
            if signal not in self._said:
                _log.warning("%s", note)
        if "memory" in self.setup.given and not self.setup.frees_memory and not decision.admit:
            faults["admission"] = "memory"
            if "admission" not in self._said:
                _log.warning("memory is above its limit: no new work is to be admitted (a move frees no memory here)")
        self._said = set(faults)

    def _run(self) -> None:
        try:
            while not self._stop.wait(self._options.tick):
                self.step()
        except BaseException as error:
            self._error = error
            _log.exception("the RuntimeManager of %s stopped deciding", self._model_name)

    def _open_files(self) -> None:
        if self._options.log is not None:
            self._log = Log(Path(self._options.log), self.setup, self._state.index)
        if self._options.status and hasattr(os, "getuid"):
            try:
                folder = private_folder(status_folder())
                self._status_file = folder / f"{os.getpid()}-{next(_NUMBERS)}.json"
                self._started = process_start(os.getpid())
                self._write_status(self._options.clock())
            except (OSError, FoveateError) as error:
                self._status_file = None
                _log.warning("foveate top cannot see this manager: %s", error)

    def _write_status(self, now: float) -> None:
        if self._status_file is None:
            return
        self._status_at = now
        try:
            write_status(self._status_file, self.status())
        except OSError as error:
            self._status_file = None
            _log.warning("foveate top cannot see this manager any more: %s", error)

    def status(self) -> dict[str, Any]:
        """What `foveate top` shows, as JSON: index, costs, limits, readings, levels of sites, and the last moves."""
        with self._lock:
            index, costs, limits = self._state.index, self.setup.costs, self.setup.limits
            plan = self.frontier[index]
            credit = self._state.credit
            return {
                "pid": os.getpid(),
                "started": self._started,
                "updated": time.time(),
                "model": self._model_name,
                "index": index,
                "last": self.setup.last,
                "kl": _finite(costs.kl[index]),
                "expected_kl": _finite(self.expected_kl),
                "seconds_per_token": costs.seconds_per_token[index] if costs.seconds_per_token else None,
                "bits": plan.bits,
                "bytes_read": plan.bytes_read,
                "limits": self.setup.given | ({} if credit is None else {"quality": limits.quality}),
                "credit": credit,
                "admits": self._state.admit,
                "switches": self.switches,
                "readings": {
                    name: {"value": None if r.value is None else _finite(r.value), "reason": r.reason}
                    for name, r in self._readings.items()
                },
                "levels": {site.name: [plan.mean_level(site), site.weights] for site in plan.weight_sites()},
                "moves": [
                    {"ago": self._options.clock() - m.at, "before": m.decision.before, "index": m.decision.index,
                     "reason": m.decision.reason}
                    for m in list(self.moves)[-10:]
                ],
            }  # fmt: skip


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _sensors(limits: Limits, given: Mapping[str, Callable[[], float | str] | Sensor]) -> list[WatchedSensor]:
    """The sensors of all limits, and of the load if somebody reads it; the caller's in place of the machine's."""
    own = {
        name: value if isinstance(value, Sensor) else Sensor(signal=name, read=value) for name, value in given.items()
    }
    for name, sensor in own.items():
        if sensor.signal != name:
            raise FoveateError(f"the sensor given for {name} is one of {sensor.signal}")
    wanted = [*limits.given(), *(["load"] if "load" in own else [])]
    unused = set(own) - set(wanted)
    if unused:
        raise FoveateError(f"sensors are given for {', '.join(sorted(unused))}, which have no limit")
    if "queue_wait" in wanted and "queue_wait" not in own:
        raise FoveateError(
            "queue_wait is limited and nobody reads it: give sensors={'queue_wait': a function that returns seconds}"
        )
    found = machine_sensors() | own
    return [WatchedSensor(found[name]) for name in wanted if name in found]
