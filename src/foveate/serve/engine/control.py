"""PrecisionControl: who decides the precision of each pass of a served model, and what is said of it.

Deciders act between two steps, on the thread that runs the model, so that no step is torn: the runtime manager moves
the index; the operator (the page, or `POST /v1/precision`) holds an index, sets a floor or another limit of memory; and
each request may fix its own tier or floor, for its own rows. While the operator holds the index, the manager waits.
Where the server was told so, inputs choose and importance follows, too (`foveate.serve.engine.deciders`).
"""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from foveate.allocate import frontier as computed_frontier
from foveate.errors import BudgetError, FloorError
from foveate.folder.known_frontier import known_frontier
from foveate.folder.resize import resize
from foveate.importance import Decision as Move
from foveate.importance import TrackingOptions, Verdict
from foveate.nn.levels import (
    apply,
    current_map,
    set_classes,
    set_floor,
    set_index,
    set_row_classes,
    state_of,
    withdraw,
)
from foveate.nn.registry import profile_of, registry_of
from foveate.nn.residency.registry import ResidentRegistry
from foveate.precision.frontiers import Frontier
from foveate.precision.state import Floor, Request
from foveate.runtime import Costs, Limits, ManagerOptions, RuntimeManager
from foveate.runtime.levels import DECIDER as MANAGER
from foveate.runtime.site_control import below
from foveate.serve.engine.deciders import Deciders, who_decides
from foveate.sizes import format_bytes, parse_bytes

#: The names under which the server, its operator, and the rows of its requests decide, and of importance in its log.
SERVER, OPERATOR, ROWS, IMPORTANCE = "server", "operator", "rows of requests", "importance"
#: What is read with the planes in memory is looked at anew after so many times as long as a look took.
_LOOKING_SHARE = 20.0
_log = logging.getLogger("foveate")


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What somebody decided: when (seconds since 1970), the index before and after it, who decided it, and why."""

    at: float
    before: int
    index: int
    by: str
    reason: str


def served_frontier(model: nn.Module, points: int, whole: bool) -> Frontier:
    """The chain that a server moves along: the one in the folder, else one by the profile.

    Args:
        model: a quantized model.
        points: maps of a chain by the profile.
        whole: whether every plane is loaded. If not, the chain begins with the map in force, and goes on below it.
    """
    chain = known_frontier(model) or computed_frontier(profile_of(model), points)
    return chain if whole else below(current_map(model), chain)


class PrecisionControl:
    """Decides between the steps of one served model.

    Args:
        model: a quantized model.
        frontier: the chain of maps, which is put in force at its best map.
        bend: the limits that the manager keeps; None for no manager.
        options: how the manager works.
        queue_wait: seconds that the first request in the queue has waited.
        adapt_on: batches on which inputs that choose find the price of a byte; none if they do not choose.
        follow: how importance is followed; None if it is not.

    Attributes:
        frontier: the chain of maps in force: that which was given or, index by index of the same bytes, that of the
            importance that is followed.
        bits: the average bits of a weight at each index, if all planes that it reads are in memory.
        deciders: inputs that choose, and importance.
        decisions: the last decisions, the newest last.
        switches: how many there were, by direction ("down" is to fewer bits) and by who decided.
        manager: the manager, or None.
        fault: why the manager no longer decides; empty while it does.
        held: the index at which the operator holds; None if the manager moves it.
    """

    def __init__(
        self,
        model: nn.Module,
        frontier: Frontier,
        *,
        bend: Limits | None,
        options: ManagerOptions,
        queue_wait: Callable[[], float],
        adapt_on: Sequence[Any] = (),
        follow: TrackingOptions | None = None,
    ) -> None:
        self._model, self._registry, self._given = model, registry_of(model), frontier
        apply(model, frontier, decider=SERVER)
        self._take(frontier)
        try:
            self.deciders = Deciders(model, frontier, adapt_on=adapt_on, follow=follow, told=self._moved)
        except BaseException:
            withdraw(model, SERVER)
            raise
        self.decisions: deque[Decision] = deque(maxlen=256)
        self.switches: Counter[tuple[str, str]] = Counter()
        self.fault = ""
        self.held: int | None = None
        self.floor: Floor | None = None
        self.manager: RuntimeManager | None = None
        self._tick, self._next = options.tick, 0.0
        self._classes: Mapping[Request, int] = {}
        self._index = state_of(model).index
        if bend is not None and len(frontier) > 1:
            sensors = {"queue_wait": queue_wait} if bend.queue_wait is not None else {}
            given = replace(options, background=False, costs=options.costs or _measured_costs(frontier))
            self.manager = RuntimeManager(model, limits=bend, sensors=sensors, options=given)

    def _take(self, chain: Frontier) -> None:
        """Know another chain as that in force."""
        self.frontier, self.bits = chain, tuple(chain.bits(index) for index in range(len(chain)))
        self._read_bits: dict[int, tuple[int, float]] = {}
        self._read_again = 0.0

    def read_bits(self, index: int) -> float:
        """The average bits of a weight that are read at an index, with the planes that are in memory."""
        version = self._registry.version
        known, bits = self._read_bits.get(index, (-1, 0.0))
        now = time.perf_counter()
        if known != version and (known < 0 or now >= self._read_again):
            bits = self._registry.as_read(self.frontier[index]).bits
            self._read_bits[index] = version, bits
            taken = time.perf_counter() - now
            self._read_again = now + _LOOKING_SHARE * taken  # planes arrive one by one, and each look takes its time
        return bits

    @property
    def index(self) -> int:
        """The index in force, for rows that ask for nothing."""
        return self._index

    @property
    def names(self) -> dict[str, int]:
        """The indices that the points of the given frontier have; importance that is followed keeps them."""
        return {point.name: point.index for point in self._given.points}

    @property
    def admits(self) -> bool:
        """Whether new work may be admitted, which the manager denies while memory is above its limit."""
        return self.manager is None or bool(self.fault) or self.manager.admits

    def start(self) -> None:
        """Let the deciders begin."""
        if self.manager is not None:
            self.manager.start()
        try:
            self.deciders.start()
        except BaseException:
            if self.manager is not None:
                self.manager.close()
            raise

    def close(self) -> None:
        """Withdraw everything that was decided here."""
        self.deciders.close()
        if self.manager is not None:
            try:
                self.manager.close()
            except Exception:  # its log may be on a full disk
                _log.exception("the runtime manager did not end as it should")
        for decider in (OPERATOR, SERVER):
            withdraw(self._model, decider)
        self._set_classes(())

    def turn(self) -> None:
        """Between two steps: let the deciders decide what is due, the manager only while nobody holds the index."""
        if isinstance(self._registry, ResidentRegistry):
            self._registry.take_arrivals()
        if self.deciders.is_due:
            self.forget_rows()  # floors of requests that have ended would forbid maps that are tried
        chain = self.deciders.turn()
        if chain is not None and chain is not self.frontier:
            self._take(chain)
        now = time.monotonic()
        if self.manager is None or self.fault or self.held is not None or now < self._next:
            return
        self._next = now + self._tick
        try:
            decision = self.manager.step()
        except Exception as error:  # a log on a full disk, a sensor's driver: the answers go on
            self.fault = f"{type(error).__name__}: {error}"
            _log.exception("the runtime manager stopped deciding; the index stays where it is")
            return
        self._noted(MANAGER, decision.reason)

    def hold(self, index: int | None) -> None:
        """Hold an index in place of the manager; None gives it back.

        Raises:
            BudgetError: the frontier has no such index.
        """
        if index is not None:
            if not 0 <= index < len(self.frontier):
                raise BudgetError(f"index (={index}) is not on the frontier, 0..{len(self.frontier) - 1}")
            if self.manager is not None:  # the furthest demand counts, so the manager's is taken back meanwhile
                set_index(self._model, 0, decider=MANAGER)
            set_index(self._model, index, decider=OPERATOR)
            self.held = index
            self._noted(OPERATOR, f"the operator holds index {index}")
        elif self.held is not None:
            set_index(self._model, 0, decider=OPERATOR)
            if self.manager is not None and not self.fault:
                set_index(self._model, self.manager.index, decider=MANAGER)
            self.held = None
            self._noted(OPERATOR, "the operator gave the index back")

    def stand(self, floor: Floor | None) -> None:
        """Let a floor stand for all requests; None takes it back.

        Raises:
            FloorError: the frontier cannot meet it.
        """
        if floor is not None:
            set_floor(self._model, floor, decider=OPERATOR)
        else:
            withdraw(self._model, OPERATOR)
            if self.held is not None:
                set_index(self._model, self.held, decider=OPERATOR)
        self.floor = floor
        self._noted(OPERATOR, "the operator set a floor" if floor else "the operator took the floor back")

    @property
    def resident_bytes(self) -> int | None:
        """Bytes of planes in memory; None where all of them are."""
        return self._registry.report().resident if isinstance(self._registry, ResidentRegistry) else None

    def resize(self, memory: int | str) -> None:
        """Have the model take at most so much memory from now on (`foveate.resize`).

        Raises:
            BudgetError: the size is none, or the standing floor needs more.
            FoveateError: all planes of the model are in memory.
        """
        resize(self._model, memory=memory)
        self._read_again = 0.0
        size = memory if memory == "auto" else format_bytes(parse_bytes(memory))
        self._note(OPERATOR, f"the operator gives the model {size} of memory")

    def pass_indices(self, requests: Sequence[Request | None], counts: Sequence[int]) -> tuple[list[int], bool]:
        """Give the rows of the next pass their maps.

        Args:
            requests: what the rows of each sequence of the pass ask for.
            counts: how many tokens each sequence has in the pass.

        Returns:
            The index at which each sequence is read, and whether rows were given maps of their own.
        """
        requests = [self._met(request) for request in requests]
        asked = [request for request in requests if request is not None]
        if not set(asked) <= set(self._classes):
            self._set_classes(asked)
        state = state_of(self._model)
        if asked:
            classes = [0 if request is None else self._classes[request] for request in requests]
            set_row_classes(self._model, [c for c, count in zip(classes, counts, strict=True) for _ in range(count)])
        else:
            set_row_classes(self._model, None)
        indices = {request: state.index_of(request) for request in dict.fromkeys(requests)}
        return [indices[request] for request in requests], bool(asked)

    def _met(self, request: Request | None) -> Request | None:
        """A request as the chain in force can meet it: since it was taken, its floor may be above the best map."""
        try:
            state_of(self._model).index_of(request)
        except FloorError:
            return Request(tier=0)
        return request

    def maps_of(self, request: Request | None) -> int:
        """How many maps a generation needs for the rows of a request: two where inputs choose."""
        fixed = request is not None and request.tier is not None
        return 1 if fixed or self.deciders.adapted is None else 2

    def forget_rows(self) -> None:
        """Between two steps: no rows have a precision of their own until the next step."""
        self._set_classes(())

    def _set_classes(self, requests: Iterable[Request]) -> None:
        self._classes = set_classes(self._model, requests, decider=ROWS)

    def _noted(self, by: str, reason: str) -> None:
        """Note a change of the index, if there was one."""
        index = state_of(self._model).index
        if index == self._index:
            return
        self._note(by, reason, index)
        self.switches["down" if index > self._index else "up", by] += 1
        self._index = index

    def _note(self, by: str, reason: str, index: int | None = None) -> None:
        index = self._index if index is None else index
        self.decisions.append(Decision(at=time.time(), before=self._index, index=index, by=by, reason=reason))

    def _moved(self, move: Move) -> None:
        self._note(IMPORTANCE, str(move))

    def _who_decides(self) -> list[dict[str, str]]:
        found = who_decides(self._model)
        if self.held is None:
            return found
        others = [one for one in found if one["by"] != OPERATOR or not one["what"].startswith("index")]
        return [*others, {"by": OPERATOR, "what": f"holds index {self.held}"}]

    def status(self) -> dict[str, Any]:
        """What `GET /v1/precision` says."""
        chain, given, manager = self.frontier, self._given, self.manager
        floors = state_of(self._model).floor
        tracker = self.deciders.tracker
        return {
            "index": self._index,
            "bits": round(self.read_bits(self._index), 4),
            "chosen_bits": self.deciders.mean_bits,
            "importance": _importance_status(tracker.verdict) if tracker is not None else self.deciders.fault or None,
            "deciders": self._who_decides(),
            "frontier": [
                {"index": index, "bits": bits, "bytes_read": chain.bytes_read(index), "kl": _kl(given, index)}
                for index, bits in enumerate(self.bits)
            ],
            "names": self.names,
            "held": self.held is not None,
            "floor": floors,
            "manager": None if manager is None else {
                "decides": not self.fault and self.held is None,
                "fault": self.fault,
                "limits": manager.setup.given,
                "admits": self.admits,
            },
            "switches": {f"{way} by {by}": count for (way, by), count in sorted(self.switches.items())},
        }  # fmt: skip


def _importance_status(verdict: Verdict) -> dict[str, Any]:
    decisions = verdict.decisions
    return {
        "tokens": verdict.tokens,
        "moves": verdict.moves,
        "refused": len(decisions) - verdict.moves,
        "last": str(decisions[-1]) if decisions else "no shift, static is fine",
    }


def _kl(chain: Frontier, index: int) -> float | None:
    return chain.kl(index) if chain.points else None


def _measured_costs(chain: Frontier) -> Costs | None:
    """The costs that were measured of a frontier, in place of predicted ones; None if nothing was."""
    if not chain.points:
        return None
    every = range(len(chain))
    timed = all(point.seconds is not None for point in chain.points)
    return Costs(
        kl=tuple(chain.kl(index) for index in every),
        seconds_per_token=tuple(chain.seconds(index) for index in every) if timed else (),
    )
