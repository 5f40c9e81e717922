"""The control unit of one node, as a pure function: (state, observation) -> (state, decision).

It keeps a running estimate of the mean and variance of the node's input and holds it against what calibration saw: not
against one number, for batches differ, but against the least and the greatest that any batch of calibration had. How
far the estimate lies outside is the *drift*, a factor: 1 at the edge, less inside. Far enough outside, the input is
read one level more precisely, and very far outside two. Going back takes more than going up: the drift must stay below
a lower threshold for a while, and longer each time that going back turns out to have been too early.

The running estimate forgets by values seen, not by calls, so that calls of one token are judged as calmly as calls of a
thousand; and nothing is decided before as many values were seen as a batch of calibration had.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Tolerance:
    """How much a node's input may differ from calibration, and how quickly the unit answers.

    Attributes:
        near: drift from which on an input is read one level higher.
        far: drift from which on it is read two levels higher.
        beyond: the share of values outside the calibrated range that counts as `near`; ten times it counts as `far`.
        release: an input goes back where its drift is below 1 + release * (threshold - 1), and values beyond the range
            below `release` times their threshold.
        dwell: observations for which it must be so.
        patience: `dwell` doubles at each return that had to be taken back, up to this many observations.
        memory: after how many batches of calibration's size an observation counts half.
    """

    near: float = 1.25
    far: float = 3.0
    beyond: float = 1e-3
    release: float = 0.6
    dwell: int = 4
    patience: int = 64
    memory: float = 2.0


@dataclass(frozen=True)
class Calibrated:
    """What calibration saw of a node's input.

    Attributes:
        deviation: the root of the variance.
        means, variances: the least and the greatest of any batch.
        limits: the least and the greatest value.
        batch: values a batch.
    """

    deviation: float
    means: tuple[float, float]
    variances: tuple[float, float]
    limits: tuple[float, float]
    batch: float


@dataclass(frozen=True)
class Observation:
    """A call's input: how many values, their mean and variance, and the share of them beyond the calibrated range."""

    values: int
    mean: float
    variance: float
    beyond: float


@dataclass(frozen=True)
class Decision:
    """How many levels above its map's an input is to be read (0, 1, 2), and why.

    Attributes:
        raised: levels above the map's.
        drift: how far the running estimate lies outside of what calibration saw; 1 at its edge.
        beyond: the running share of values beyond the calibrated range.
    """

    raised: int
    drift: float
    beyond: float


@dataclass(frozen=True)
class State:
    """What a unit remembers: decayed sums, the decision in force, and for how long it has been calm.

    Attributes:
        values, mean, square, beyond: decayed sums of values, of them times the mean, the mean square and the share
            beyond.
        raised: levels above the map's.
        calm: observations in a row that asked for less.
        dwell: how many it takes; 0 before the first return.
        since_return: observations since the last return.
    """

    values: float = 0.0
    mean: float = 0.0
    square: float = 0.0
    beyond: float = 0.0
    raised: int = 0
    calm: int = 0
    dwell: int = 0
    since_return: int | None = None


def step(tolerance: Tolerance, seen: Calibrated, state: State, now: Observation) -> tuple[State, Decision]:
    """Take one observation. An observation that is not finite asks for two levels more and is not remembered."""
    if not all(map(math.isfinite, (now.mean, now.variance, now.beyond))):
        return replace(state, raised=2, calm=0), Decision(2, math.inf, math.nan)
    keep = 0.5 ** (now.values / max(tolerance.memory * seen.batch, 1.0))
    state = replace(
        state,
        values=keep * state.values + now.values,
        mean=keep * state.mean + now.values * now.mean,
        square=keep * state.square + now.values * (now.variance + now.mean**2),
        beyond=keep * state.beyond + now.values * now.beyond,
        since_return=None if state.since_return is None else state.since_return + 1,
    )
    total = max(state.values, 1.0)
    mean, beyond = state.mean / total, state.beyond / total
    drift = _drift(seen, mean, max(state.square / total - mean**2, 0.0))
    if state.values < seen.batch and not state.raised:
        return state, Decision(0, drift, beyond)
    wanted = _levels(tolerance, drift, beyond, 1.0)
    kept = _levels(tolerance, drift, beyond, tolerance.release)
    dwell = state.dwell or tolerance.dwell
    if wanted > state.raised:
        early = state.since_return is not None and state.since_return < 4 * dwell
        longer = min(2 * dwell, tolerance.patience) if early else dwell
        state = replace(state, raised=wanted, calm=0, dwell=longer)
    elif kept >= state.raised:
        state = replace(state, calm=0)
    elif state.calm + 1 < dwell:
        state = replace(state, calm=state.calm + 1)
    else:
        state = replace(state, raised=kept, calm=0, dwell=dwell, since_return=0)
    return state, Decision(state.raised, drift, beyond)


def _levels(tolerance: Tolerance, drift: float, beyond: float, ease: float) -> int:
    """How many levels more a drift asks for, with thresholds eased towards none."""
    if drift > 1 + ease * (tolerance.far - 1) or beyond > ease * 10 * tolerance.beyond:
        return 2
    return int(drift > 1 + ease * (tolerance.near - 1) or beyond > ease * tolerance.beyond)


def _drift(seen: Calibrated, mean: float, variance: float) -> float:
    """How far mean and variance lie outside of those of calibration's batches, as one factor."""
    tiny = 1e-30
    deviation = max(seen.deviation, tiny)
    wider = (variance + tiny) / (seen.variances[1] + tiny)
    narrower = (seen.variances[0] + tiny) / (variance + tiny)
    aside = max(mean - seen.means[1], seen.means[0] - mean, 0.0) / deviation
    return max(wider, narrower, 1 + aside if aside > 0 else 0.0)
