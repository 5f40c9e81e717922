"""Estimate how long quantizing takes, after the first batch.

The time of the passes follows from the time of the first batch. The time of rounding follows from its arithmetic.
Rounding a weight of N rows and K columns, whose rows are chosen jointly in blocks of R, is work of four kinds:

    N K                  searching grids, packing, scoring                        seconds a value
    s N K                choosing codes in s sweeps                               seconds a code
    s N K R              adding what the errors of R rows mean for each other     seconds a row term
    (10 s + 12) N K^2    five error streams in s sweeps, and scores of six levels seconds a float32 operation

A weight is left when its sweeps stop paying, so s is the number that weights took on average (`USUAL_SWEEPS`), and one
for the feedback before. How long each kind takes on one thread of this machine is measured in a second or two; some
weights are rounded at the same time (`foveate.calibrate.parallel`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from foveate.calibrate.parallel import workers_for
from foveate.calibrate.reference_outputs import batches_compared
from foveate.calibrate.schedule import Schedule, WeightCost, further_passes
from foveate.collect.statistics import Factored
from foveate.formats.levels import NESTED_LEVELS
from foveate.kernels.backends.table import ensure_loaded
from foveate.kernels.threads import threads
from foveate.planes import from_codes
from foveate.progress import in_words
from foveate.rounding import round_weight, with_descent
from foveate.rounding.descent import FITTED_REACH
from foveate.sensitivity import tile_losses

#: The inputs, and those of a group, of the piece that is timed: larger pieces take long, smaller ones time the calls.
_COLUMNS, _GROUP = 256, 64
#: How many sweeps a weight takes before they stop paying, on average.
USUAL_SWEEPS = 4


def _product_operations(sweeps: int) -> int:
    """Operations of the products of a row with a matrix [K, K], over K^2: 5 streams a sweep, and scores of 6 levels."""
    return 2 * (5 * sweeps + 6)


_PRODUCT_OPERATIONS = _product_operations(USUAL_SWEEPS)


@dataclass(frozen=True)
class Machine:
    """Seconds that one thread of this machine takes for each kind of work.

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
        sweeps = USUAL_SWEEPS if compiled else 1
        size, rows, columns = 768, 512, _COLUMNS
        with threads(1):
            a = torch.randn(size, size, generator=torch.Generator().manual_seed(0))
            flop = _seconds(lambda: a @ a) / (2 * size**3)
            products = flop * _product_operations(sweeps) * columns
            nearest = _seconds(lambda: _round(rows, 0)) / (rows * columns)
            single_rows = _seconds(lambda: _round(rows, sweeps)) / (rows * columns)
            code = max(single_rows - nearest - products, 0.0) / (sweeps + 1)
            if not compiled:  # each row is rounded by itself
                return cls(nearest, code, 0.0, flop)
            joint_rows = _seconds(lambda: _round(rows, sweeps, _correlated(rows)[None])) / (rows * columns)
        return cls(nearest, code, max(joint_rows - single_rows, 0.0) / ((sweeps + 1) * rows), flop)

    def rounding(self, cost: WeightCost, descends: bool) -> float:
        """Seconds that rounding one weight takes on one thread."""
        rows, columns = cost.rows, cost.columns
        seconds = self.value
        if descends:
            each = self.code + self.row_term * cost.joint_rows
            seconds += (USUAL_SWEEPS + 1) * each + self.flop * _PRODUCT_OPERATIONS * columns
        return seconds * rows * columns


def _correlated(size: int) -> torch.Tensor:
    """A covariance with a direction that all share, so that codes go on changing for some sweeps."""
    return torch.eye(size) + 4.0 / size


def _round(rows: int, sweeps: int, gradients_BRR: torch.Tensor | None = None) -> None:
    columns = _COLUMNS
    w_NK = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))
    r = round_weight(w_NK, group=_GROUP)
    if sweeps:
        r = with_descent(
            w_NK, r, _correlated(columns), gradients_BRR, sweeps=sweeps, least_gain=0.0, reach=FITTED_REACH
        )
    planes = from_codes(r.anchor, r.residual, r.scale, r.offset, r.gain, group=_GROUP, reach=r.reach)
    fisher = Factored(torch.ones(rows), torch.ones(columns))
    tile_losses(w_NK, lambda level: planes.dequantize(), [fisher], _GROUP)


def _seconds(work: Callable[[], object]) -> float:
    """The shorter of two runs after a first one. Other programs on this machine go on running, and count."""
    work()
    taken = []
    for _ in range(2):
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return min(taken)


@dataclass(frozen=True)
class Estimate:
    """Seconds that quantizing takes.

    Attributes:
        passes: seconds of all passes over the data; NaN if the number of batches is not known.
        batch: seconds of one batch in the first pass.
        rounding: seconds of rounding all weights.
        times: the number of passes over the data.
        comparing: seconds of comparing the model on planes with the reference outputs.
    """

    passes: float
    batch: float
    rounding: float
    times: int = 1
    comparing: float = 0.0

    def __str__(self) -> str:
        rounding = f"rounding {in_words(self.rounding)}"
        if math.isnan(self.passes):
            return f"calibrating takes about {in_words(self.batch)} a batch, then {rounding}"
        total = in_words(self.passes + self.rounding + self.comparing)
        often = f" {self.times} times" if self.times > 1 else ""
        return f"this takes about {total}: going through the data{often} {in_words(self.passes)}, {rounding}"


@dataclass(frozen=True)
class Timed:
    """What the first batch showed.

    Attributes:
        batch: seconds that it took in the first pass.
        forward: seconds that it took without statistics.
        batches: the number of batches that are left, itself included; None if it is not known.
        samples: the number of its samples.
        processes: how many processes share the weights and the comparison.
    """

    batch: float
    forward: float
    batches: int | None
    samples: int
    processes: int = 1


def estimate(costs: Sequence[WeightCost], inputs: Sequence[float], schedule: Schedule, timed: Timed) -> Estimate:
    """Add up the time of the passes, of rounding and of comparing.

    Args:
        costs: what each weight takes.
        inputs: how many rows of input each weight sees in all. Weights that see too few are rounded to nearest.
        schedule: how the calibration is carried out.
        timed: what the first batch showed.
    """
    batch, forward, batches = timed.batch, timed.forward, timed.batches
    machine = Machine.measured()
    each = [
        machine.rounding(cost, bool(cost.large_bytes) and rows >= cost.columns)
        for cost, rows in zip(costs, inputs, strict=True)
    ]
    rounding = max(sum(each) / (workers_for(len(costs)) * timed.processes), max(each, default=0.0))
    further = further_passes(costs, schedule)
    passes, compared = math.nan, batches_compared(timed.samples)
    if batches is not None:
        passes = batches * (batch * (1 + further.with_gradients) + forward * further.forward_only)
        compared = min(batches, -(-compared // timed.processes))
    # the reference outputs are compared at each level, and the model runs once on planes before
    comparing = (compared * len(NESTED_LEVELS) + 1) * forward
    return Estimate(passes, batch, rounding, len(schedule.parts), comparing)


def lower_bound(costs: Sequence[WeightCost]) -> float:
    """A lower bound of the seconds that rounding takes, by the speed of a fast core: nothing is measured."""
    return sum(3e-7 * w.rows * w.columns + _PRODUCT_OPERATIONS * w.rows * w.columns**2 / 4e11 for w in costs)
