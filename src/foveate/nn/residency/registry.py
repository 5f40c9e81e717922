"""Residency in a live model: its planes come and go between two calls of it, and it reads what is there.

The kernels read each tile at its active level or at the level that is in memory, whichever is lower. So a plane that is
missing never stops a call, and never gives a wrong number: the call reads fewer bits, and that is counted.

`ResidentRegistry` is the registry of such a model. It writes what can be read (the stored levels of
`foveate.planes.PlaneTensor`) when no call is running, and it tells the residency what the map in force reads.

Shapes: NT strips of a weight, G groups.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from foveate.checkpoint import Tiers
from foveate.errors import LevelError
from foveate.formats.levels import TOP_LEVEL, WEIGHT_LEVELS
from foveate.memory.policy.limits import AutoLimit
from foveate.memory.report import MemoryReport
from foveate.memory.residency import LOOK_EVERY
from foveate.memory.streaming import StreamingResidency
from foveate.nn.plane_module import PlaneModule
from foveate.nn.registry import Registry, registry_of, tiles_of
from foveate.nn.residency.pass_gate import PassGate
from foveate.nn.residency.streaming import Streaming
from foveate.nn.residency.use import UseCounter, alone
from foveate.planes import highest, rounded_up, shortfall
from foveate.precision.maps import Levels, PrecisionMap, input_level_for
from foveate.precision.state import LevelState

#: The decider of the map in force while nobody else applied one.
DECIDER = "memory"


class ResidentRegistry(Registry):
    """The registry of a model whose planes come and go.

    Attributes:
        residency: which runs are in memory.
        tiers: the folder that the model came from, whose files are open.
        stored: the levels that it stores, uint8 [NT, G] for each weight.
        strict: whether a call waits for planes instead of reading fewer bits.
        default: the default map of the folder.
        auto: the limit that follows free memory; None where the limit is fixed.
        hooks: what was put on the model.
    """

    residency: StreamingResidency
    tiers: Tiers
    stored: Mapping[str, Tensor]
    strict: bool
    default: PrecisionMap | None
    auto: AutoLimit | None
    hooks: list[RemovableHandle]
    _gate: PassGate
    _streaming: Streaming | None
    _embeddings: tuple[PlaneModule, ...]
    _found: PrecisionMap | None
    _found_for: PrecisionMap | None
    _read: dict[str, Tensor]
    _short: frozenset[str]
    _short_passes: int
    _uncounted: int
    _use: UseCounter
    _fallbacks: dict[str, int]
    _wait_s: float
    _version: int

    @classmethod
    def of(cls, model: nn.Module, residency: StreamingResidency, tiers: Tiers, *, strict: bool) -> ResidentRegistry:
        """Take over from the registry of a model whose weights have gaps (`foveate.checkpoint.read_tiers`)."""
        registry = registry_of(model)
        own = cls.__new__(cls)
        own.__dict__.update(registry.__dict__)
        own.residency, own.tiers, own.strict = residency, tiers, strict
        own.stored = tiers.stored
        own._gate = PassGate(model)
        inputs = set(own.inputs.values())
        own._found = own._found_for = None
        own._streaming = None
        own._embeddings = tuple(m for m in model.modules() if isinstance(m, PlaneModule) and m not in inputs)
        own._read = {}
        own._short = frozenset()
        own._short_passes = own._uncounted = own._version = 0
        own._fallbacks = {}
        own._wait_s = 0.0
        own.auto = own.default = None
        own._use = UseCounter([s for s in own.sites if s.kind == "weight"], alone(model), tiers.row_frequency)
        for weight in own.weights.values():
            weight.users.discard(registry)
            weight.users.add(own)
        own.renew()
        return own

    # What is stored on disk counts as stored: a map may ask for it, and gets it when it is in memory.

    def renew(self) -> None:
        """Take the levels that the folder stores."""
        self._take([self.stored[name] for name in self.weights])

    def _first_shortfall(self, plan: PrecisionMap) -> str | None:
        for name, stored in self.stored.items():
            short = shortfall(tiles_of(plan, name, stored), stored, self._exact_of(name))
            if short is not None:
                return f"{name} at level {short[0]}: the folder stores some of its tiles up to {short[1]} bits only"
        return None

    def _exact_of(self, name: str) -> Tensor | None:
        """The level of each tile's exact values, which are always in memory: uint8 [NT, G]; None if there are none."""
        exact = self.weights[name].value.exact
        return None if exact is None else exact.levels()

    def _tiles(self, plan: PrecisionMap, name: str) -> Tensor:
        """The level at which a map reads each tile of a weight, if all planes are in memory: uint8 [NT, G]."""
        stored, exact = self.stored[name], self._exact_of(name)
        tiles = tiles_of(plan, name, stored)
        return tiles if exact is None else rounded_up(tiles, stored, exact)

    def _of_planes(self, plan: PrecisionMap, name: str) -> Tensor:
        """The same for planes alone: 0 where exact values are read in their place."""
        tiles = self._tiles(plan, name)
        return torch.where(tiles > TOP_LEVEL, 0, tiles)

    @property
    def plan(self) -> PrecisionMap | None:
        """The map that is read: the one that was decided, at the levels that are in memory."""
        wanted = self.wanted
        if wanted is None:
            return None
        if self._found is None or self._found_for is not wanted:
            self._found, self._found_for = self.as_read(wanted), wanted
        return self._found

    def _put(self, changed: Callable[[LevelState | None], LevelState]) -> LevelState:
        """Put a state in force. What it reads and is not in memory is fetched; until then less is read."""
        if self._streaming is not None:
            with self._gate.alone():
                self._end_streaming()
        state = super()._put(changed)
        composed = self.generations.composed
        assert composed is not None
        read: dict[str, Tensor] = {}
        for name in self.stored:
            tiles = torch.stack([self._of_planes(plan, name) for plan in composed.maps]).amax(0)
            read[name] = tiles.amax(1) if tiles.numel() else tiles.new_zeros(len(tiles))
        self._note_shortfall(read)
        self.residency.want(self._shares)
        return state

    def _shares(self) -> list[float]:
        """For each run the share of its strips of which the maps in force read it."""
        ends = {name: tuple(int(end) for end in levels.aminmax()) for name, levels in self._read.items() if len(levels)}
        found = []
        for run in self.residency.held.runs:
            least, most = ends[run.weight]
            if least < run.tag.level <= most:
                found.append(float((self._read[run.weight][run.first : run.last] >= run.tag.level).float().mean()))
            else:  # all strips or none, as in most weights
                found.append(float(run.tag.level <= least))
        return found

    # What happens between two calls of the model.

    def begin_pass(self, module: nn.Module, args: Any) -> None:
        """A forward pre-hook: a call of the model begins."""
        if self.strict and self._short:
            self._wait()
        self._gate.begin(self._between, self.residency.arrivals, one_at_a_time=self._streaming is not None)
        self._use.begin_pass()
        if self._streaming is not None:
            self._streaming.begin_pass()

    def end_pass(self, module: nn.Module, args: Any, output: Any) -> None:
        """A forward hook: a call of the model has ended."""
        self._use.end_pass()
        self._gate.end()

    def _between(self) -> None:
        self._uncounted += 1
        if self._use.counts and self._uncounted >= LOOK_EVERY:
            self.residency.use(self._use.rates(self.residency.held.runs), self._uncounted)
            self._uncounted = 0
        self.residency.between_passes(self._publish)
        self._short_passes += 1

    def _publish(self, names: Collection[str]) -> None:
        """Write what can be read of these weights. No call is running."""
        if not names:
            return
        for name in names:
            self._write_caps(name, self.residency.caps[name])
        self._version += 1
        self._note_shortfall(self._read, names)

    def _write_caps(self, name: str, caps: Tensor) -> None:
        self.weights[name].value.stored_levels.copy_(torch.minimum(self.stored[name], caps[:, None]))

    def _note_shortfall(self, read: dict[str, Tensor], names: Collection[str] | None = None) -> None:
        """Count what the passes since the last change read below their map, and see which weights do from now on; only
        these weights, if they are given, may have changed.
        """
        for name in self._short:
            self._fallbacks[name] = self._fallbacks.get(name, 0) + self._short_passes
        self._short_passes = 0
        self._read = read
        self._found = None
        caps = self.residency.caps
        if self._streaming is not None:  # every layer gets what the map says
            self._short = frozenset()
            return
        changed = read if names is None else [name for name in names if name in read]
        short = {name for name in changed if bool((read[name] > caps[name]).any())}
        self._short = frozenset(short | (self._short - set(changed)))

    @property
    def version(self) -> int:
        """A number that changes when planes come or go."""
        return self._version

    def highest_of(self, name: str) -> Tensor:
        """The highest level at which maps may read each tile of a weight, in memory or on disk, uint8 [NT, G]."""
        return highest(self.stored[name], self.weights[name].value.exact)

    def as_read(self, plan: PrecisionMap) -> PrecisionMap:
        """A map at the levels that are in memory."""
        if self._streaming is not None:
            return plan
        levels: dict[str, Levels] = dict(plan.levels)
        for name in self.stored:
            caps = self.residency.caps[name]
            tiles = self._tiles(plan, name)
            lowered_tiles = torch.where(tiles > TOP_LEVEL, tiles, torch.minimum(tiles, caps[:, None]))
            levels[name] = bytes(lowered_tiles.flatten().tolist())
        lowered = replace(plan, levels=levels)
        return plan if lowered == plan else replace(lowered, predicted_loss=float("nan"))

    def _wait(self) -> None:
        """Wait until all that the map in force reads is in memory; where it does not fit, begin to stream it."""
        began = time.monotonic()
        while self._short:
            with self._gate.alone():
                read = self._read_runs()
                if not self.residency.require(read):
                    self._stream(read)
                    break
                self.residency.between_passes(self._publish, 0)
                self.residency.settle(numbers=self.residency.missing(self._read))
        self._wait_s += time.monotonic() - began

    def _read_runs(self) -> frozenset[int]:
        """The runs that the maps in force read, and those that they need."""
        runs = enumerate(self.residency.held.runs)
        read = {n for n, r in runs if bool((self._read[r.weight][r.first : r.last] >= r.tag.level).any())}
        return self.residency.held.closed(read)

    def _stream(self, read: frozenset[int]) -> None:
        layers = dict.fromkeys((*self.inputs.values(), *self._embeddings))
        self._streaming = Streaming(layers, self.residency, read, self._write_caps)
        try:
            self.residency.stream(self._streaming.keep, self._publish)
        except BaseException:
            self._end_streaming()
            raise
        self._note_shortfall(self._read)

    def _end_streaming(self) -> None:
        if self._streaming is not None:
            self._streaming.end()
            self._streaming = None
            self.residency.stream_no_more()
            self._note_shortfall(self._read)

    # What users ask for.

    @property
    def decided(self) -> PrecisionMap | None:
        """The map that somebody decided: that of the folder where only the memory limit did."""
        state = self.generations.state
        return self.default if state is not None and state.frontier_by == DECIDER and self.default else self.wanted

    def fill(self) -> None:
        """Read what fits in the limit, and wait for it; the map in force becomes the best that fits.

        Raises:
            CheckpointError: a file is damaged.
        """
        with self._gate.alone():
            while True:
                self.residency.between_passes(self._publish, 0)
                if not self.residency.waiting():
                    break
                self.residency.settle()
            self._follow()

    def resize(self, limit: int, floor: PrecisionMap | int | None = None) -> None:
        """Take at most so many bytes from now on. What leaves has left on return, what comes is still on its way.

        Args:
            limit: bytes.
            floor: the standing floor, which stays readable: a map, or a level for all weights. As before if not given;
                0 has only the first plane stay.

        Raises:
            BudgetError: the floor, or the least possible, does not fit; nothing was changed.
        """
        levels = None if floor is None else self._strips_of(floor)
        with self._gate.alone():
            self.residency.resize(limit, levels)
            self._end_streaming()
            self.residency.between_passes(self._publish, 0)
            self._follow()

    def _strips_of(self, floor: PrecisionMap | int) -> dict[str, Tensor]:
        if not isinstance(floor, PrecisionMap) and (type(floor) is not int or floor not in WEIGHT_LEVELS):
            raise LevelError(f"floor (={floor!r}) is neither a map nor one of the levels {WEIGHT_LEVELS}")
        found = {}
        for name, stored in self.stored.items():
            tiles = torch.full_like(stored, floor) if isinstance(floor, int) else self._of_planes(floor, name)
            found[name] = torch.minimum(tiles, stored).amax(1)
        return found

    def _follow(self) -> None:
        """Where nobody else decided, the map in force is what the limit allows."""
        state = self.generations.state
        if state is None or state.frontier_by == DECIDER:
            self.apply(self.best(), DECIDER)

    def best(self) -> PrecisionMap:
        """The map of what is in memory once the mover has done what it was told."""
        caps = self.residency.goal_caps()
        levels: dict[str, Levels] = {}
        mean: dict[str, float] = {}
        for site in self.sites:
            if site.kind != "weight":
                continue
            tiles = torch.minimum(self.stored[site.name], caps[site.name][:, None])
            exact = self._exact_of(site.name)
            if exact is not None:  # where there are no planes
                tiles = torch.where(self.stored[site.name] == 0, exact, tiles)
            levels[site.name] = bytes(tiles.flatten().tolist())
            mean.update(
                dict.fromkeys((site.name, *site.aliases), float(tiles.float().mean()) if tiles.numel() else 0.0)
            )
        for site in self.sites:
            if site.kind == "input":
                levels[site.name] = input_level_for(mean[f"{site.name.removesuffix(':input')}:weight"])
        return PrecisionMap(self.sites, levels, self.other_bytes, other_parameters=self.other_parameters)

    def take_arrivals(self) -> None:
        """Read the planes that have arrived, between two calls: else the next call takes them."""
        if self.residency.arrivals():
            with self._gate.alone():
                self.residency.between_passes(self._publish, 0)

    def bytes_of(self, plan: PrecisionMap) -> int:
        """The bytes that the model takes with the planes that a map reads, and those that never leave."""
        read = {name: self._of_planes(plan, name).amax(1) for name in self.stored}
        held = self.residency.held
        runs = {n for n, r in enumerate(held.runs) if bool((read[r.weight][r.first : r.last] >= r.tag.level).any())}
        kept = held.closed(runs | self.residency.floor)
        return held.fixed + sum(held.runs[n].size for n in kept)

    def leave(self) -> None:
        """Take all hooks off the model, which holds no planes any more, and close the files."""
        for hook in self.hooks:
            hook.remove()
        self._end_streaming()
        self._use.end()
        self.auto = None
        self.residency.close()

    def report(self) -> MemoryReport:
        """What is in memory, and what went wrong."""
        counts = dict(self._fallbacks)
        for name in self._short:
            counts[name] = counts.get(name, 0) + self._short_passes
        return self.residency.report({name: n for name, n in counts.items() if n}, self._wait_s)
