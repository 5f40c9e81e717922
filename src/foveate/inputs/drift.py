"""The controller of one input, a pure function: (state, observation) -> (state, decision).

It keeps running estimates of the mean and variance of an input and compares them with the calibration data. Batches
differ, so the reference is an interval: the least and the greatest mean and variance of any calibration batch. The
*drift* is the factor by which the estimates lie outside of that interval: 1 at its edge, and less inside. An input that
drifts is read one level higher, and an input that drifts far two levels higher. Returning has hysteresis: the drift
must stay below a lower threshold for several observations, and this dwell doubles after each return that was too early.

The running estimates decay by the number of values seen, not by calls, so that calls of one token and of a thousand
tokens are judged alike. Nothing is decided before as many values were seen as a calibration batch had.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Tolerance:
    """How much an input may differ from the calibration data, and how quickly the controller responds.

    Attributes:
        near: the drift above which an input is read one level higher.
        far: the drift above which an input is read two levels higher.
        beyond: the share of values outside the calibrated range that counts as `near`; ten times the share is `far`.
        release: an input returns when its drift is below 1 + release * (threshold - 1), and its share of values
            outside the range is below `release` times the threshold of that share.
        dwell: the number of successive observations for which this must hold.
        patience: `dwell` doubles after each return that was too early, up to this many observations.
        memory: the half-life of an observation, in batches of the calibration's size.
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
    """The statistics of an input over the calibration data.

    Attributes:
        deviation: the standard deviation of its values.
        means, variances: the least and the greatest mean and variance of any batch.
        limits: the least and the greatest value.
        batch: the number of values in a batch.
    """

    deviation: float
    means: tuple[float, float]
    variances: tuple[float, float]
    limits: tuple[float, float]
    batch: float


@dataclass(frozen=True)
class Observation:
    """The input of one call: number of values, mean, variance, and share of values beyond the calibrated range."""

    values: int
    mean: float
    variance: float
    beyond: float


@dataclass(frozen=True)
class Decision:
    """How many levels above its map an input is read, and why.

    Attributes:
        raised: 0, 1 or 2 levels above the level of the map.
        drift: how far the running estimates lie outside of the calibrated interval; 1 at its edge.
        beyond: the running share of values beyond the calibrated range.
    """

    raised: int
    drift: float
    beyond: float


@dataclass(frozen=True)
class State:
    """The state of a controller: decayed sums, the decision in force, and the counters of its hysteresis.

    Attributes:
        values: the decayed number of values.
        mean, square, beyond: decayed sums over calls of the number of values times their mean, their mean square, and
            their share beyond the range.
        raised: levels above the level of the map.
        calm: successive observations below the release threshold.
        dwell: successive observations that a return takes; 0 before the first return.
        since_return: observations since the last return, or None before it.
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
    """Take one observation. One that is not finite raises the input by two levels and leaves the sums as they are."""
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
    """The levels to raise an input by, with the distance of all thresholds from no drift multiplied by `ease`."""
    if drift > 1 + ease * (tolerance.far - 1) or beyond > ease * 10 * tolerance.beyond:
        return 2
    return int(drift > 1 + ease * (tolerance.near - 1) or beyond > ease * tolerance.beyond)


def _drift(seen: Calibrated, mean: float, variance: float) -> float:
    """How far the mean and variance lie outside of those of the calibration batches, as one factor."""
    tiny = 1e-30
    deviation = max(seen.deviation, tiny)
    wider = (variance + tiny) / (seen.variances[1] + tiny)
    narrower = (seen.variances[0] + tiny) / (variance + tiny)
    aside = max(mean - seen.means[1], seen.means[0] - mean, 0.0) / deviation
    return max(wider, narrower, 1 + aside if aside > 0 else 0.0)
