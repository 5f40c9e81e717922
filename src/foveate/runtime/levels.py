"""ModelLevels: how the manager reaches a live model. It puts a frontier in force, moves the index, and withdraws.

It also sees the model's passes, by two hooks on the outermost module: how many there were, and how long each took. A
move that is asked for during a pass is carried out after it, so that every pass is read at one index.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn

from foveate.errors import FoveateError
from foveate.nn.registry import quantized_part, registry_of
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

    def start(self, frontier: Frontier) -> None:
        """Put a frontier in force at index 0."""

    def set_index(self, index: int) -> None:
        """Move to an index, between two passes."""

    def passes(self) -> tuple[float, float | None]:
        """Passes since the last call of this method, and the running mean of seconds a pass; None before the first."""

    def withdraw(self) -> None:
        """Put back what was in force before `start`."""


class ModelLevels:
    """The levels and passes of one quantized model; one manager has them at a time.

    Args:
        model: the quantized model.

    Raises:
        FoveateError: the model is not quantized, or another manager has it.
    """

    def __init__(self, model: nn.Module) -> None:
        self.index = 0
        self._registry = registry_of(model)
        self._root = quantized_part(model)
        self._refuse_a_second()
        if self._registry.applied is None:
            raise FoveateError("the model has no map in force: call foveate.apply first")
        self._before = self._registry.applied
        self._frontier: Frontier | None = None
        self._lock = threading.RLock()
        self._inside = 0
        self._pending: int | None = None
        self._count, self._started = 0, 0.0
        self._seconds: float | None = None
        self._handles: list[Any] = []

    def current(self) -> PrecisionMap:
        """The map in force before the manager started."""
        return self._before[0]

    def start(self, frontier: Frontier) -> None:
        """Put a frontier in force at index 0, and watch the passes."""
        with self._lock:
            self._refuse_a_second()
            if self._registry.applied is not self._before:
                raise FoveateError("another map was applied since the manager was made: make it anew")
            self._root.__dict__[_ATTRIBUTE] = self
            self._frontier = frontier
            try:
                self._write(0)
            except BaseException:
                del self._root.__dict__[_ATTRIBUTE]
                raise
            self._handles = [
                self._root.register_forward_pre_hook(self._begin),
                self._root.register_forward_hook(self._end, always_call=True),
            ]

    def set_index(self, index: int) -> None:
        """Move to an index: now, or after the pass that runs."""
        with self._lock:
            self._pending = index
            if not self._inside:
                self._move()

    def passes(self) -> tuple[float, float | None]:
        """Passes since the last call of this method, and the running mean of seconds a pass; None before the first."""
        with self._lock:
            count, self._count = self._count, 0
            return float(count), self._seconds

    def withdraw(self) -> None:
        """Put back what was in force before `start`, unless somebody applied another map meanwhile."""
        with self._lock:
            for handle in self._handles:
                handle.remove()
            self._handles.clear()
            self._pending = None
            if self._root.__dict__.get(_ATTRIBUTE) is self:
                del self._root.__dict__[_ATTRIBUTE]
                if self._is_ours():
                    self._registry.apply(*self._before)
            self.index = 0

    def _refuse_a_second(self) -> None:
        if _ATTRIBUTE in self._root.__dict__:
            raise FoveateError(
                f"another RuntimeManager moves the levels of this {type(self._root).__name__}: a model has one manager "
                "at a time"
            )

    def _is_ours(self) -> bool:
        applied = self._registry.applied
        return applied is not None and self._frontier is not None and applied[0] is self._frontier[self.index]

    def _begin(self, *_: Any) -> None:
        if torch.compiler.is_compiling():
            return  # a compiled graph cannot hold the count of passes
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                self._move()
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
            self._move()

    def _move(self) -> None:
        if self._pending is not None and self._pending != self.index:
            self._write(self._pending)
        self._pending = None

    def _write(self, index: int) -> None:
        assert self._frontier is not None
        plan = self._frontier[index]
        self._registry.apply(plan, plan)
        self.index = index


#: Makes the control of a model; tests hand in a fake.
MakeControl = Callable[[nn.Module], LevelControl]
