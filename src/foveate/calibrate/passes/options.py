"""What a calibration is asked for, and the names of its phases."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed import ProcessGroup

from foveate.collect.objectives import Objective
from foveate.errors import DataError
from foveate.progress import Bar
from foveate.rounding.exact import KeepExact

#: The phases of quantizing, as progress names them. Further passes are `pass 2 of 3`.
DRY_RUN, FIRST_PASS, ROUNDING, PLANES, COMPARING = "dry run", "first pass", "rounding", "planes", "comparing"

#: Not a phase of its own: what of the passes was spent on statistics.
STATISTICS = "of it statistics"


@contextmanager
def one_step(bar: Bar, phase: str) -> Iterator[None]:
    """A phase that is a single piece of work."""
    for _ in bar.track(phase, (None,)):
        yield


@dataclass(frozen=True, kw_only=True)
class CalibrationOptions:
    """What calibration optimizes for, and what it may use; as for `foveate.quantize`.

    Attributes:
        objective: what the output is for; inferred from the first output if not given.
        loss: the loss whose increase is kept small, instead of the objective's own.
        memory: the most bytes that the process may take; three quarters of the free memory if not given.
        resume: the file that keeps the statistics; no file if not given.
        progress: whether to show progress.
        exact: which tiles keep their exact values; none if not given.
        processes: the processes that share the calibration; this one alone if not given.

    Raises:
        DataError: `objective` is not an `Objective`.
    """

    objective: Objective | None = None
    loss: Callable[[Any, Any], Tensor] | None = None
    memory: int | None = None
    resume: Path | None = None
    progress: bool = True
    exact: KeepExact | None = None
    processes: ProcessGroup | None = None

    def __post_init__(self) -> None:
        if self.objective is not None and not isinstance(self.objective, Objective):
            raise DataError(f"objective (={self.objective!r}) is not an Objective, such as foveate.Logits()")
