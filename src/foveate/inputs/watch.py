"""watch_inputs: a control unit at every node of a live model (`foveate.inputs.drift`), and what they do about drift.

A node that drifts is read one level higher, 4 to 8 to 16, or two. And as long as any node drifts, static scales are
suspended in the whole model: a range that the data left would go on cutting them off at any level, and the ranges of
all nodes come from the same data, which the model is evidently not reading any more. When the data come back, levels
and ranges do too.

What it costs: on each call that is looked at, a strided sample of every node's input is reduced to a mean, a variance
and a count (some tens of microseconds a node); other calls pay for a Python hook.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, cast

import torch
from torch import Tensor, nn

from foveate.errors import FoveateError
from foveate.inputs.drift import Calibrated, Decision, Observation, State, Tolerance, step
from foveate.nn.registry import profile_of, quantized_part, registry_of
from foveate.precision.maps import Levels, PrecisionMap
from foveate.precision.profiles import Profile

#: Values of an input that are looked at, at most.
_SAMPLE = 1 << 14
_LADDER = (4, 8, 16)


@dataclass(frozen=True)
class Change:
    """A change of one input's precision.

    Attributes:
        call: which call of the model, counted from the start of the watch.
        site: the input, as in `model.layers.3.mlp.up_proj:input`.
        before, after: its levels.
        drift: how far its mean and variance lay outside those of calibration's batches; 1 at the edge.
        beyond: the share of its values beyond the calibrated range.
    """

    call: int
    site: str
    before: int
    after: int
    drift: float
    beyond: float

    def __str__(self) -> str:
        return (
            f"call {self.call}: {self.site} from {self.before} to {self.after} bits "
            f"(drift {self.drift:.3g}, {self.beyond:.2%} beyond the calibrated range)"
        )


class InputWatch:
    """A watch over a model's inputs; use `watch_inputs`. A context manager: leaving it ends the watch.

    Attributes:
        changes: every change so far, in order.
        calls: calls of the model so far.
    """

    def __init__(
        self, model: nn.Module, tolerance: Tolerance, every: int, on_change: Callable[[Change], None] | None
    ) -> None:
        self.changes: list[Change] = []
        self.calls = 0
        self._registry = registry_of(model)
        self._tolerance, self._every, self._on_change = tolerance, every, on_change
        self._nodes = _calibrated(profile_of(model))
        self._nodes = {name: seen for name, seen in self._nodes.items() if name in self._registry.inputs}
        if not self._nodes:
            raise FoveateError("the profile has no statistics of inputs: quantize the original again")
        self._states = dict.fromkeys(self._nodes, State())
        self._decisions: dict[str, Decision] = {}
        self._base = self._maps()
        self._mine = self._base
        self._ranges = self._set_ranges = self._registry.ranges
        self._looking = False
        root = quantized_part(model)
        self._hooks = [root.register_forward_pre_hook(self._begin), root.register_forward_hook(self._end)]
        for name in self._nodes:
            module = self._registry.inputs[name]
            self._hooks.append(module.register_forward_pre_hook(self._hook(name), with_kwargs=True))

    def _maps(self) -> tuple[PrecisionMap, PrecisionMap]:
        return cast("tuple[PrecisionMap, PrecisionMap]", self._registry.applied)

    def _begin(self, module: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling():
            return  # a graph has no room for decisions: calls that are not compiled are watched
        self._looking = self.calls % self._every == 0
        self.calls += 1

    def _hook(self, name: str) -> Callable[..., None]:
        def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not torch.compiler.is_compiling() and self._looking:
                now = _observed(args[0] if args else kwargs["input"], self._nodes[name].limits)
                if now is not None:
                    decided = step(self._tolerance, self._nodes[name], self._states[name], now)
                    self._states[name], self._decisions[name] = decided

        return look

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        self._looking = False
        if self._registry.ranges != self._set_ranges:
            self._ranges = self._registry.ranges  # someone chose other scales
        if self._maps() is not self._mine:
            self._base = self._unraised()  # someone applied another map: what is raised is raised above that one
            self._apply()
        elif self._decisions:
            self._apply()

    def _unraised(self) -> tuple[PrecisionMap, PrecisionMap]:
        """The maps in force; for one of this watch's own, the one that it was raised from."""
        known = {id(mine): base for mine, base in zip(self._mine, self._base, strict=True)}
        first, second = self._maps()
        return known.get(id(first), first), known.get(id(second), second)

    def _apply(self) -> None:
        now, decisions = self._maps(), dict(self._decisions)
        wanted = [{name: _above(base, name, d.raised) for name, d in decisions.items()} for base in self._base]
        differ = [
            [n for n, level in levels.items() if level != one.levels[n]]
            for levels, one in zip(wanted, now, strict=True)
        ]
        changed = [(name, wanted[0][name]) for name in differ[0]]
        ranges = {} if any(decision.raised for decision in decisions.values()) else self._ranges
        if not any(differ) and ranges == self._registry.ranges:
            self._mine, self._set_ranges = now, self._registry.ranges
            return
        before = now[0].levels
        first = _raised(self._base[0], self._decisions)
        second = first if self._base[1] is self._base[0] else _raised(self._base[1], self._decisions)
        self._registry.apply(first, second)
        self._registry.set_ranges(ranges)
        self._mine, self._set_ranges = self._maps(), self._registry.ranges
        for name, level in changed:
            why = self._decisions[name]
            change = Change(self.calls - 1, name, cast(int, before[name]), level, why.drift, why.beyond)
            self.changes.append(change)
            if self._on_change is not None:
                self._on_change(change)

    @property
    def raised(self) -> dict[str, int]:
        """The inputs that are read above their map's level now, and their levels."""
        now = self._maps()[0].levels
        return {name: cast(int, now[name]) for name, state in self._states.items() if state.raised}

    @property
    def drift(self) -> dict[str, float]:
        """The drift of every input, as of the last call that was looked at; 1 at the edge of what calibration saw."""
        return {name: decision.drift for name, decision in self._decisions.items()}

    def close(self) -> None:
        """End the watch: the map and the scales are what they would be without it."""
        if not self._hooks:
            return
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        if any(one is not base for one, base in zip(self._maps(), self._unraised(), strict=True)):
            self._registry.apply(*self._unraised())
        if self._registry.ranges == self._set_ranges:
            self._registry.set_ranges(self._ranges)
        self._decisions.clear()

    def __enter__(self) -> InputWatch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __str__(self) -> str:
        lines = [f"{self.calls} calls, {len(self.changes)} changes, {len(self.raised)} inputs raised now"]
        return "\n".join([*lines, *map(str, self.changes)])


def watch_inputs(
    model: nn.Module,
    *,
    tolerance: Tolerance | None = None,
    every: int = 1,
    on_change: Callable[[Change], None] | None = None,
) -> InputWatch:
    """Watch every input of a live model, and read those at more bits whose data drift from calibration.

    Each node keeps a running mean and variance of its input. Where these leave what calibration's batches had, the
    input is read one level higher than the map in force says, or two; and while any is, static scales
    (`use_static_scales`, to be called before) are suspended everywhere. When the data come back, so do levels and
    scales. Levels change after the call that showed the drift. With data like calibration's nothing changes.

    Args:
        model: a quantized model, with its profile. Eager: a model that is compiled is compiled again with the hooks.
        tolerance: thresholds, see `foveate.inputs.Tolerance`.
        every: look at every so many calls of the model.
        on_change: called with each `foveate.inputs.Change`.

    Returns:
        The watch, a context manager; `changes` says which node changed when and why, `close()` ends it.

    Raises:
        FoveateError: the model is not quantized, or its profile has no statistics of inputs; or every is not positive.
    """
    if every < 1:
        raise FoveateError(f"every (={every}) must be at least 1")
    return InputWatch(model, tolerance or Tolerance(), every, on_change)


def _calibrated(profile: Profile) -> dict[str, Calibrated]:
    found = {}
    for site in profile.input_sites():
        kept = profile.statistics.get(site.name, {})
        if "batch_moments" not in kept:
            continue
        (mean_low, variance_low), (mean_high, variance_high) = kept["batch_moments"].tolist()
        low, high = kept["range"].tolist()
        found[site.name] = Calibrated(
            deviation=float(kept["variance"]) ** 0.5,
            means=(mean_low, mean_high),
            variances=(variance_low, variance_high),
            limits=(low, high),
            batch=float(kept["batch_values"]),
        )
    return found


def _observed(x: Tensor, limits: tuple[float, float]) -> Observation | None:
    count = x.numel()
    if not count:
        return None
    stride = -(-count // _SAMPLE)
    while math.gcd(stride, count) > 1:  # else it would see some columns, and others never
        stride += 1
    sample = x.detach().reshape(-1)[::stride].float()
    variance, mean = torch.var_mean(sample, correction=0)
    # beyond by more than rounding: what calibration saw itself is within
    room = 1e-4 * (limits[1] - limits[0])
    beyond = ((sample < limits[0] - room) | (sample > limits[1] + room)).float().mean()
    return Observation(count, float(mean), float(variance), float(beyond))


def _above(plan: PrecisionMap, name: str, raised: int) -> int:
    level = cast(int, plan.levels[name])
    if level not in _LADDER:
        return level
    return _LADDER[min(_LADDER.index(level) + raised, len(_LADDER) - 1)]


def _raised(plan: PrecisionMap, decisions: dict[str, Decision]) -> PrecisionMap:
    higher: dict[str, Levels] = {n: _above(plan, n, d.raised) for n, d in decisions.items() if d.raised}
    if not higher:
        return plan
    return replace(plan, levels={**plan.levels, **higher}, predicted_loss=float("nan"))
