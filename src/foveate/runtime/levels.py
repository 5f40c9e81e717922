"""ModelLevels: how the manager reaches a live model. It hands over a frontier, demands an index, and withdraws.

It is one decider among others (`foveate.nn.levels`): a floor that stands counts for it, and what others decided is as
they left it when the manager withdraws. A move takes effect with the next pass. Two hooks on the outermost module count
passes, and measure how long each took.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn

from foveate.errors import FoveateError
from foveate.nn.levels import apply, set_index, state_of, withdraw
from foveate.nn.registry import quantized_part
from foveate.precision.frontiers import Frontier
from foveate.precision.maps import PrecisionMap

#: The name under which the manager decides.
DECIDER = "runtime"
_ATTRIBUTE = "_foveate_runtime"
#: The weight of the newest pass in the running mean of seconds a pass.
_NEWEST = 0.1


class LevelControl(Protocol):
    """What the manager needs of a model.

    Attributes:
        index: the index in force.
    """

    index: int

    def current(self) -> PrecisionMap:
        """The map in force before the manager started."""

    def chain(self) -> Frontier | None:
        """The frontier in force, if it has more than one map."""

    def start(self, frontier: Frontier) -> None:
        """Put a frontier in force, unless it is in force already."""

    def set_index(self, index: int) -> None:
        """Demand an index from the next pass on."""

    def passes(self) -> tuple[float, float | None]:
        """Passes since the last call of this method, and the running mean of seconds a pass; None before the first."""

    def withdraw(self) -> None:
        """Take back the frontier and the index."""


class ModelLevels:
    """The levels and passes of one quantized model; one manager has them at a time.

    Args:
        model: the quantized model.

    Raises:
        FoveateError: the model is not quantized, or another manager has it.
    """

    def __init__(self, model: nn.Module) -> None:
        self.index = 0
        self._model, self._root = model, quantized_part(model)
        self._refuse_a_second()
        self._before = state_of(model).frontier
        self._lock = threading.Lock()
        self._inside = 0
        self._count, self._started = 0, 0.0
        self._seconds: float | None = None
        self._handles: list[Any] = []

    def current(self) -> PrecisionMap:
        """The map in force before the manager started."""
        state = state_of(self._model)
        return state.frontier[state.index]

    def chain(self) -> Frontier | None:
        """The frontier in force, if it has more than one map."""
        frontier = state_of(self._model).frontier
        return frontier if len(frontier) > 1 else None

    def start(self, frontier: Frontier) -> None:
        """Put a frontier in force, unless it is in force already, and watch the passes."""
        self._refuse_a_second()
        if state_of(self._model).frontier is not self._before:
            raise FoveateError("another map was applied since the manager was made: make it anew")
        self._root.__dict__[_ATTRIBUTE] = self
        try:
            if frontier is not state_of(self._model).frontier:
                apply(self._model, frontier, decider=DECIDER)
        except BaseException:
            del self._root.__dict__[_ATTRIBUTE]
            raise
        self._handles = [
            self._root.register_forward_pre_hook(self._begin),
            self._root.register_forward_hook(self._end, always_call=True),
        ]

    def set_index(self, index: int) -> None:
        """Demand an index from the next pass on; where another frontier came into force, its end is the furthest."""
        set_index(self._model, min(index, len(state_of(self._model).frontier) - 1), decider=DECIDER)
        self.index = index

    def passes(self) -> tuple[float, float | None]:
        """Passes since the last call of this method, and the running mean of seconds a pass; None before the first."""
        with self._lock:
            count, self._count = self._count, 0
            return float(count), self._seconds

    def withdraw(self) -> None:
        """Take back the frontier and the index, and watch no more."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._root.__dict__.get(_ATTRIBUTE) is self:
            del self._root.__dict__[_ATTRIBUTE]
            withdraw(self._model, DECIDER)
        self.index = 0

    def _refuse_a_second(self) -> None:
        if _ATTRIBUTE in self._root.__dict__:
            raise FoveateError(
                f"another RuntimeManager moves the levels of this {type(self._root).__name__}: a model has one manager "
                "at a time"
            )

    def _begin(self, *_: Any) -> None:
        if torch.compiler.is_compiling():
            return  # a compiled graph cannot hold the count of passes
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                self._started = time.perf_counter()

    def _end(self, *_: Any) -> None:
        if torch.compiler.is_compiling():
            return
        with self._lock:
            self._inside = max(self._inside - 1, 0)
            if self._inside:
                return
            taken = time.perf_counter() - self._started
            self._seconds = taken if self._seconds is None else self._seconds + _NEWEST * (taken - self._seconds)
            self._count += 1


#: Makes the control of a model; tests hand in a fake.
MakeControl = Callable[[nn.Module], LevelControl]
