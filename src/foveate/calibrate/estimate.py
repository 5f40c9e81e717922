"""Estimate how long quantizing takes, after the first batch.

The time of the passes follows from the time of the first batch. The time of rounding follows from its arithmetic.
Rounding a weight of N rows and K columns, whose rows are chosen jointly in blocks of R, is work of four kinds:

    N K            searching grids, packing, scoring                              seconds a value
    10 N K         choosing codes in ten sweeps                                   seconds a code
    10 N K R       adding what the errors of R rows mean for each other           seconds a row term
    112 N K^2      five error streams in ten sweeps, and scores of six levels     seconds a float32 operation

How long each takes on this machine is measured in half a second.
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
    """Operations of the products of a row with a matrix [K, K], over K^2: 5 streams a sweep, and scores of 6 levels."""
    return 2 * (5 * sweeps + 6)


_PRODUCT_OPERATIONS = _product_operations(SWEEPS)


@dataclass(frozen=True)
class Machine:
    """Seconds that this machine takes for each kind of work, with the threads that it uses now.

    Attributes:
        value: seconds for one value of a weight.
        code: seconds for one code in one sweep.
        row_term: seconds for one code in one sweep, for each row that is chosen jointly with the row of the code.
        flop: seconds for one float32 operation of a matrix product.
    """

    value: float
    code: float
    row_term: float
    flop: float

    @classmethod
    def measured(cls) -> Machine:
        """Time small pieces of the work itself. Without compiled kernels one sweep is timed, since it takes seconds."""
        compiled = ensure_loaded().isa is not None
        sweeps = SWEEPS if compiled else 1
        size, rows, columns = 768, 512, 2 * _GROUP
        a = torch.randn(size, size, generator=torch.Generator().manual_seed(0))
        flop = _seconds(lambda: a @ a) / (2 * size**3)
        products = flop * _product_operations(sweeps) * columns
        nearest = _seconds(lambda: _round(rows, 0)) / (rows * columns)
        single_rows = _seconds(lambda: _round(rows, sweeps)) / (rows * columns)
        code = max(single_rows - nearest - products, 0.0) / sweeps
        if not compiled:  # each row is rounded by itself
            return cls(nearest, code, 0.0, flop)
        joint_rows = _seconds(lambda: _round(rows, sweeps, torch.eye(rows)[None])) / (rows * columns)
        return cls(nearest, code, max(joint_rows - single_rows, 0.0) / (sweeps * rows), flop)

    def rounding(self, cost: WeightCost, descends: bool) -> float:
        """Seconds that rounding one weight takes."""
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
    """The mean of two runs after a first one. Other programs on this machine go on running, and count."""
    work()
    started = time.perf_counter()
    work()
    work()
    return (time.perf_counter() - started) / 2


@dataclass(frozen=True)
class Estimate:
    """Seconds that quantizing takes.

    Attributes:
        passes: seconds of all passes over the data; NaN if the number of batches is not known.
        batch: seconds of one batch in the first pass.
        rounding: seconds of rounding all weights.
        times: the number of passes over the data.
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
    """Add up the time of the passes and of rounding.

    Args:
        costs: what each weight takes.
        inputs: how many rows of input each weight sees in all. Weights that see too few are rounded to nearest.
        schedule: how the calibration is carried out.
        batch: seconds that the first batch took in the first pass.
        forward: seconds that the first batch took without statistics.
        batches: the number of batches, if it is known.
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
        # the reference outputs are compared at each level
        passes += min(batches, MAX_BATCHES) * len(NESTED_LEVELS) * forward
    return Estimate(passes, batch, rounding, len(schedule.parts))


def lower_bound(costs: Sequence[WeightCost]) -> float:
    """A lower bound of the seconds that rounding takes, by the speed of a fast core: nothing is measured."""
    return sum(3e-7 * w.rows * w.columns + _PRODUCT_OPERATIONS * w.rows * w.columns**2 / 4e11 for w in costs)


def in_words(seconds: float) -> str:
    """Seconds as text: `45 s`, `12 min`, `3.5 h`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
