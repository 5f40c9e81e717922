"""watch_inputs: a controller for every input of a live model (`foveate.inputs.drift`), and its response to drift.

An input that drifts is read one or two levels higher, along 4, 8 and 16 bits. While any input drifts, static scales are
suspended in the whole model. A static range would clip the drifted values at every level. The ranges of all inputs come
from the same calibration data, so drift at one input makes all ranges doubtful. When the data return to what
calibration saw, the levels and ranges return too.

The cost: each observed call reduces a strided sample of every input to a mean, a variance and a count, which takes some
tens of microseconds for each input. Other calls pay only for a Python hook.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from foveate.errors import FoveateError
from foveate.inputs.drift import Calibrated, Decision, Observation, State, Tolerance, step
from foveate.nn.closing import Closing
from foveate.nn.levels import current_map, set_raises, withdraw
from foveate.nn.registry import profile_of, quantized_part, registry_of
from foveate.precision.profiles import Profile

#: At most this many values of an input are sampled.
_MAX_SAMPLED_VALUES = 1 << 14
_NUMBERS = itertools.count(1)


@dataclass(frozen=True)
class Change:
    """A change of one input's precision.

    Attributes:
        call: the call of the model, counted from the start of the watch.
        site: the input, as in `model.layers.3.mlp.up_proj:input`.
        before, after: its levels before and after the change.
        drift: how far its mean and variance lay outside those of the calibration batches; 1 at the edge.
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


class InputWatch(Closing):
    """A watch over a model's inputs, made by `watch_inputs`. It is a context manager; leaving it ends the watch.

    Attributes:
        changes: all changes so far, in order.
        calls: the number of calls of the model so far.
    """

    def __init__(
        self, model: nn.Module, tolerance: Tolerance, every: int, on_change: Callable[[Change], None] | None
    ) -> None:
        self.changes: list[Change] = []
        self.calls = 0
        self._registry = registry_of(model)
        self._tolerance, self._every, self._on_change = tolerance, every, on_change
        self._calibrated = _calibrated(profile_of(model))
        self._calibrated = {name: seen for name, seen in self._calibrated.items() if name in self._registry.inputs}
        if not self._calibrated:
            raise FoveateError("the profile has no statistics of inputs: quantize the original again")
        self._states = dict.fromkeys(self._calibrated, State())
        self._decisions: dict[str, Decision] = {}
        self._model, self._decider = model, f"watch_inputs {next(_NUMBERS)}"
        self._raises: dict[str, int] = {}
        self._observing = False
        root = quantized_part(model)
        self._hooks = [root.register_forward_pre_hook(self._begin), root.register_forward_hook(self._end)]
        for name in self._calibrated:
            module = self._registry.inputs[name]
            self._hooks.append(module.register_forward_pre_hook(self._hook(name), with_kwargs=True))

    def _begin(self, module: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling():
            return  # a compiled graph cannot hold decisions: only eager calls are watched
        self._observing = self.calls % self._every == 0
        self.calls += 1

    def _hook(self, name: str) -> Callable[..., None]:
        def observe(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not torch.compiler.is_compiling() and self._observing:
                now = _observed(args[0] if args else kwargs["input"], self._calibrated[name].limits)
                if now is not None:
                    decided = step(self._tolerance, self._calibrated[name], self._states[name], now)
                    self._states[name], self._decisions[name] = decided

        return observe

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        self._observing = False
        if self._decisions:
            self._decide()

    def _decide(self) -> None:
        raises = {name: d.raised for name, d in self._decisions.items() if d.raised}
        if raises == self._raises:
            return
        before = self._levels()
        set_raises(self._model, raises, decider=self._decider)
        self._raises, after = raises, self._levels()
        for name, why in self._decisions.items():
            if before[name] != after[name]:
                change = Change(self.calls - 1, name, before[name], after[name], why.drift, why.beyond)
                self.changes.append(change)
                if self._on_change is not None:
                    self._on_change(change)

    def _levels(self) -> dict[str, int]:
        """The present level of each input that is watched."""
        levels = current_map(self._model).levels
        return {name: cast(int, levels[name]) for name in self._calibrated}

    @property
    def raised(self) -> dict[str, int]:
        """The inputs that are now read above the level of their map, with their levels."""
        now = self._levels()
        return {name: now[name] for name, state in self._states.items() if state.raised}

    @property
    def drift(self) -> dict[str, float]:
        """The drift of every input in the last observed call; 1 at the edge of the calibrated interval."""
        return {name: decision.drift for name, decision in self._decisions.items()}

    def close(self) -> None:
        """End the watch, and restore the map and the scales that would be in force without it."""
        if not self._hooks:
            return
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        withdraw(self._model, self._decider)
        self._decisions.clear()

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
    """Watch every input of a live model, and read an input at more bits while its data drift from the calibration data.

    The watch keeps a running mean and variance of each input. When they leave the interval of the calibration batches,
    the input is read one or two levels above the map in force. While any input is raised, static scales are suspended
    in the whole model (call `use_static_scales` before the watch). When the data return, the levels and scales return.
    Levels change after the call that showed the drift. Data like those of the calibration change nothing.

    Args:
        model: a quantized model with its profile. It runs eagerly; a compiled model is compiled again with the hooks.
        tolerance: the thresholds, see `foveate.inputs.Tolerance`.
        every: observe one call of the model in this many.
        on_change: a function that is called with each `foveate.inputs.Change`.

    Returns:
        The watch, a context manager. `changes` lists which input changed, when and why; `close()` ends the watch.

    Raises:
        FoveateError: the model is not quantized, its profile has no statistics of inputs, or `every` is not positive.
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
    stride = -(-count // _MAX_SAMPLED_VALUES)
    while math.gcd(stride, count) > 1:  # a common divisor would leave out some columns in every row
        stride += 1
    sample = x.detach().reshape(-1)[::stride].float()
    variance, mean = torch.var_mean(sample, correction=0)
    # the margin is more than rounding, so that the calibration data themselves are within the range
    room = 1e-4 * (limits[1] - limits[0])
    beyond = ((sample < limits[0] - room) | (sample > limits[1] + room)).float().mean()
    return Observation(count, float(mean), float(variance), float(beyond))
