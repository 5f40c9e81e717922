"""How long quantizing will take, said after the first batch: its own time for the passes, arithmetic for the rounding.

Rounding a weight of N rows and K columns, R rows of which hang joint_rows, is arithmetic of four kinds, and how fast this
machine does each is measured in half a second:

    N K            searching grids, packing, scoring                    seconds a value
    10 N K         choosing codes in ten sweeps                         seconds a code
    10 N K R       what the errors of R rows mean for each other        seconds a row_term
    112 N K^2      five streams in ten sweeps, six levels scored        seconds a flop, float32
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from foveate.calibrate.reference_outputs import MAX_BATCHES
from foveate.calibrate.schedule import Schedule, WeightCost, further_passes
from foveate.collect.statistics import COVARIANCE_BLOCK, Factored
from foveate.formats.levels import NESTED_LEVELS
from foveate.kernels.backends.table import ensure_loaded
from foveate.planes import from_codes
from foveate.rounding import round_weight, with_descent
from foveate.rounding.descent import SWEEPS
from foveate.sensitivity import tile_losses

_GROUP = 64


def _product_operations(sweeps: int) -> int:
    """Operations of products of a row with a matrix [K, K], over K^2: 5 streams a sweep, and 6 levels are scored."""
    return 2 * (5 * sweeps + 6)


_PRODUCT_OPERATIONS = _product_operations(SWEEPS)


@dataclass(frozen=True)
class Machine:
    """What this machine takes, in seconds, with the threads it has now.

    Attributes:
        value: a value of a weight.
        code: a code, in each sweep.
        row_term: a code again, for each row that its row hangs joint_rows with.
        flop: a float32 operation of a matrix product.
    """

    value: float
    code: float
    row_term: float
    flop: float

    @classmethod
    def measured(cls) -> Machine:
        """Time small pieces of the work itself; without compiled kernels one sweep, for a sweep takes seconds there."""
        compiled = ensure_loaded().isa is not None
        sweeps = SWEEPS if compiled else 1
        size, rows, columns = 768, 512, 2 * _GROUP
        a = torch.randn(size, size, generator=torch.Generator().manual_seed(0))
        flop = _seconds(lambda: a @ a) / (2 * size**3)
        products = flop * _product_operations(sweeps) * columns
        nearest = _seconds(lambda: _round(rows, 0)) / (rows * columns)
        single_rows = _seconds(lambda: _round(rows, sweeps)) / (rows * columns)
        code = max(single_rows - nearest - products, 0.0) / sweeps
        if not compiled:  # rows are each for themselves
            return cls(nearest, code, 0.0, flop)
        joint_rows = _seconds(lambda: _round(rows, sweeps, torch.eye(rows)[None])) / (rows * columns)
        return cls(nearest, code, max(joint_rows - single_rows, 0.0) / (sweeps * rows), flop)

    def rounding(self, cost: WeightCost, descends: bool) -> float:
        """Seconds that one weight takes."""
        rows, columns = cost.rows, cost.columns
        seconds = self.value
        if descends:
            joint_rows = min(rows, COVARIANCE_BLOCK) if cost.kept_bytes else 0
            seconds += SWEEPS * (self.code + self.row_term * joint_rows) + self.flop * _PRODUCT_OPERATIONS * columns
        return seconds * rows * columns


def _round(rows: int, sweeps: int, gradients_BRR: torch.Tensor | None = None) -> None:
    columns = 2 * _GROUP
    w_NK = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))
    rounded = round_weight(w_NK, group=_GROUP)
    r = with_descent(w_NK, rounded, torch.eye(columns), gradients_BRR, sweeps=sweeps)
    planes = from_codes(r.anchor, r.residual, r.scale, r.offset, r.gain, group=_GROUP, reach=r.reach)
    fisher = Factored(torch.ones(rows), torch.ones(columns))
    tile_losses(w_NK, lambda level: planes.dequantize(), [fisher], _GROUP)


def _seconds(work: Callable[[], object]) -> float:
    """The mean of two runs after a first: what else runs on this machine goes on running."""
    work()
    started = time.perf_counter()
    work()
    work()
    return (time.perf_counter() - started) / 2


@dataclass(frozen=True)
class Estimate:
    """Seconds that quantizing takes.

    Attributes:
        passes: going through the data, all passes; NaN if it is not known how many batches there are.
        batch: one batch of the first pass.
        rounding: all weights.
        times: how often the data are gone through.
    """

    passes: float
    batch: float
    rounding: float
    times: int = 1

    def __str__(self) -> str:
        rounding = f"rounding {in_words(self.rounding)}"
        if math.isnan(self.passes):
            return f"calibrating takes about {in_words(self.batch)} a batch, then {rounding}"
        total = in_words(self.passes + self.rounding)
        often = f" {self.times} times" if self.times > 1 else ""
        return f"this takes about {total}: going through the data{often} {in_words(self.passes)}, {rounding}"


def estimate(
    costs: Sequence[WeightCost],
    inputs: Sequence[float],
    schedule: Schedule,
    batch: float,
    forward: float,
    batches: int | None,
) -> Estimate:
    """Add up the parts.

    Args:
        costs: the weights.
        inputs: rows of input that each of them sees in all; those that see too few are rounded to nearest.
        schedule: how the passes are made.
        batch: seconds that the first batch took in the first pass.
        forward: seconds that it took without statistics.
        batches: how many there are, if that is known.
    """
    machine = Machine.measured()
    rounding = sum(
        machine.rounding(cost, bool(cost.large_bytes) and rows >= cost.columns)
        for cost, rows in zip(costs, inputs, strict=True)
    )
    further = further_passes(costs, schedule)
    passes = math.nan
    if batches is not None:
        passes = batches * (batch * (1 + further.with_gradients) + forward * further.forward_only)
        passes += min(batches, MAX_BATCHES) * len(NESTED_LEVELS) * forward  # again on planes, at each level
    return Estimate(passes, batch, rounding, len(schedule.parts))


def lower_bound(costs: Sequence[WeightCost]) -> float:
    """Seconds that rounding takes on a fast core, without measuring anything: a lower bound."""
    return sum(3e-7 * w.rows * w.columns + _PRODUCT_OPERATIONS * w.rows * w.columns**2 / 4e11 for w in costs)


def in_words(seconds: float) -> str:
    """`45 s`, `12 min`, `3.5 h`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
