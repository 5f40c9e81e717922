"""How long quantizing will take, said after the first batch: its own time for the passes, flops for the rounding.

Rounding a weight of N rows and K columns is arithmetic of four kinds, and how fast this machine does each is measured
in half a second:

    N K          searching grids, choosing codes, packing, scoring          seconds a value
    16 K         the loop over columns for each part of the rows            seconds a column
    17 N K^2     five streams of feedback, six levels scored                seconds a flop, float32
    K^3          factoring the covariance                                   seconds a flop, float64
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from foveate.collect.statistics import Factored
from foveate.nn.streaming import Load, Plan, further_passes
from foveate.planes import from_codes
from foveate.rounding import round_weight, with_feedback
from foveate.rounding.feedback import feedback_factor
from foveate.rounding.rows import PARTS
from foveate.sensitivity import tile_losses

#: Of a product of a row with a matrix [K, K]: 5 streams see half of it each, 6 levels are scored with all of it twice.
_PRODUCTS = 5 * 1 + 6 * 2
_GROUP = 64


@dataclass(frozen=True)
class Machine:
    """What this machine takes, in seconds, with the threads it has now.

    Attributes:
        value: a value of a weight.
        column: a column of a weight.
        sweep: a column again, for each further part of the rows.
        flop: a float32 operation of a matrix product.
        factor: for a matrix of K columns, so many times K^3.
    """

    value: float
    column: float
    sweep: float
    flop: float
    factor: float

    @classmethod
    def measured(cls) -> Machine:
        """Time small pieces of the work itself."""
        size = 768
        a = torch.randn(size, size, generator=torch.Generator().manual_seed(0))
        covariance_KK = a @ a.t() / size + torch.eye(size)
        flop = _seconds(lambda: a @ a) / (2 * size**3)
        factor = _seconds(lambda: feedback_factor(covariance_KK)) / size**3
        few, many = _seconds(lambda: _round(16)), _seconds(lambda: _round(1040))
        rows, columns = 16 * PARTS, 4 * _GROUP
        together, apart = _seconds(lambda: _round(rows)), _seconds(lambda: _round(rows, torch.eye(rows)[None]))
        sweep = max(apart - together, 0.0) / (columns * (PARTS - 1))
        value = max(many - few, 0.0) / (1024 * columns)
        return cls(value, max(few / columns - 16 * value, 0.0), sweep, flop, factor)

    def rounding(self, load: Load, feedback: bool) -> float:
        """Seconds that one weight takes."""
        rows, columns = load.rows, load.columns
        seconds = self.value * rows * columns
        if feedback:
            sweeps = -(-rows * columns * 20 // (256 << 20))
            if load.kept:  # rows take up the errors of the rows before them
                sweeps = max(sweeps, min(PARTS, -(-rows // 16)))
            seconds += columns * (self.column + self.sweep * (sweeps - 1)) + self.factor * columns**3
            seconds += self.flop * _PRODUCTS * rows * columns**2
        return seconds


def _round(rows: int, gradients_BRR: torch.Tensor | None = None) -> None:
    columns = 4 * _GROUP
    w_NK = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))
    rounded = round_weight(w_NK, group=_GROUP)
    r = with_feedback(w_NK, rounded, torch.eye(columns), gradients_BRR)
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
    loads: Sequence[Load], inputs: Sequence[float], way: Plan, batch: float, forward: float, batches: int | None
) -> Estimate:
    """Add up the parts.

    Args:
        loads: the weights.
        inputs: rows of input that each of them sees in all; those that see too few are rounded to nearest.
        way: the plan.
        batch: seconds that the first batch took in the first pass.
        forward: seconds that it took without statistics.
        batches: how many there are, if that is known.
    """
    machine = Machine.measured()
    rounding = sum(
        machine.rounding(load, bool(load.large) and rows >= load.columns)
        for load, rows in zip(loads, inputs, strict=True)
    )
    further = further_passes(loads, way)
    passes = math.nan if batches is None else batches * (batch * (1 + further.whole) + forward * further.forward)
    return Estimate(passes, batch, rounding, len(way.shares))


def rough(loads: Sequence[Load]) -> float:
    """Seconds that rounding takes on a fast core, without measuring anything: a lower bound."""
    return sum(3e-7 * w.rows * w.columns + _PRODUCTS * w.rows * w.columns**2 / 2e11 for w in loads)


def in_words(seconds: float) -> str:
    """`45 s`, `12 min`, `3.5 h`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
