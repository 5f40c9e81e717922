"""ManagerOptions: how a `RuntimeManager` works, beside its limits."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from foveate.errors import FoveateError
from foveate.runtime.levels import MakeControl, ModelLevels
from foveate.runtime.policy import Costs, Policy


@dataclass(frozen=True, kw_only=True)
class ManagerOptions:
    """How a `RuntimeManager` works, beside its limits.

    Attributes:
        policy: the constants of the controller.
        costs: what each index of the frontier costs; if None, what was measured of the frontier, or else the losses
            that the profile predicts, and no times.
        tick: seconds from one decision to the next.
        background: whether a thread of the manager's decides; if not, the loop calls `step`.
        log: a file that gets every observation and decision; None for none.
        status: whether `foveate top` can see the manager.
        floor: the furthest index that is allowed; None is the last.
        residency: called with an index before a rise and after a fall, to fetch planes or give them back. If it raises
            before a rise, the rise is refused and tried again later. By default a limit of memory moves the planes of a
            model that was loaded with `memory=`.
        clock: gives seconds and does not go back.
        make_control: makes what reaches the model.
    """

    policy: Policy = field(default_factory=Policy)
    costs: Costs | None = None
    tick: float = 0.05
    background: bool = True
    log: str | Path | None = None
    status: bool = True
    floor: int | None = None
    residency: Callable[[int], None] | None = None
    clock: Callable[[], float] = time.monotonic
    make_control: MakeControl = ModelLevels

    def __post_init__(self) -> None:
        if not 0 < self.tick < math.inf:
            raise FoveateError(f"tick (={self.tick}) is not a positive number of seconds")
