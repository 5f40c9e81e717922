"""What one signal demands: an index, from its value, its limit and how long it has been above or below.

A signal is *above* while it exceeds its limit, and *calm* while it would stay below a lower target after a rise of
precision. It demands a lower precision after it was above without a break for `Policy.patience`: so the least value of
that window was above, as in CoDel. It permits a higher precision after it was calm without a break for the hold: so the
greatest value of that window was below the lower target. Two time stamps hold all of it.

The *load* is the work that arrives, in seconds of index 0 a second, and needs no limit. It demands the index at which
the KL and the price of congestion together are least. Congestion is the mean wait in a queue with several servers, in
service times and up to a factor: `r^5 / (1 - r)` at a utilisation r, which is the load times the speed at the index.
Without that price, precision would be either best or lowest, and the convex KL makes the mean of both dear. The price
is in units of the KL at the *knee* (`Setup.knee`), behind which little time is left to gain.

Source: Nichols and Jacobson, Controlling Queue Delay, ACM Queue 10(5), 2012; Sakasegawa, An approximation formula
L_q = alpha rho^beta / (1 - rho), Annals of the Institute of Statistical Mathematics 29, 1977.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from foveate.runtime.policy import Setup

#: The share of a limit that is aimed at where the effect of an index on the signal is known from its costs.
_AIM = 0.97
#: The share below which a signal of known effect is calm.
_KNOWN_CALM = 0.92
#: The power of the utilisation in the wait: sqrt(2 (m + 1)) - 1, of about 16 requests in a batch.
_POWER = 5.0
#: A wait of so many times its limit may go behind the knee.
_DESPERATE = 5.0
#: By how much the load must be able to rise before precision may rise.
_ROOM = 1.05


@dataclass(frozen=True, kw_only=True)
class Timer:
    """Since when a signal has been above its limit, calm, or at fault, in seconds; None while it is not.

    Attributes:
        above, calm, fault: the time of the first observation of the present run.
    """

    above: float | None = None
    calm: float | None = None
    fault: float | None = None


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """What a value means at an index.

    Attributes:
        above: whether it exceeds its limit.
        calm: whether it would stay below the lower target at `up_to`.
        down_to: the index that would relieve it.
        up_to: the least index that it would permit.
    """

    above: bool
    calm: bool
    down_to: int
    up_to: int


@dataclass(frozen=True, kw_only=True)
class Demand:
    """The index that one signal demands, and why. Less than the present index: it permits a rise up to there."""

    signal: str
    index: int
    reason: str


def timed(timer: Timer, above: bool, calm: bool, now: float) -> Timer:
    """The timer after one observation without a fault."""
    return Timer(
        above=(now if timer.above is None else timer.above) if above else None,
        calm=(now if timer.calm is None else timer.calm) if calm else None,
    )


def demand_of(
    signal: str, value: float, judged: Judgement, timer: Timer, index: int, waits: tuple[float, float]
) -> Demand:
    """The demand of a signal whose timer was brought up to date.

    Args:
        signal: its name.
        value: its value now.
        judged: what the value means.
        timer: since when it has been above or calm.
        index: the present index.
        waits: (now less the patience, now less the hold): runs that began no later count.
    """
    if timer.above is not None and timer.above <= waits[0] and judged.down_to > index:
        return Demand(signal=signal, index=judged.down_to, reason=f"{signal} (={value:.4g}) is above its limit")
    if timer.calm is not None and timer.calm <= waits[1] and judged.up_to < index:
        return Demand(signal=signal, index=judged.up_to, reason=f"{signal} (={value:.4g}) is calm")
    return Demand(signal=signal, index=index, reason=f"{signal} (={value:.4g}) keeps the index")


def judge(setup: Setup, signal: str, value: float, index: int) -> Judgement:
    """What the value of a signal means at an index; `power` is judged by its integral instead."""
    if signal == "load":
        down_to, up_to = _cheapest(setup, value), _cheapest(setup, _ROOM * value)
        return Judgement(
            above=down_to > index, calm=up_to < index, down_to=max(down_to, index), up_to=min(up_to, index)
        )
    limit = setup.given[signal]
    if signal == "latency" and setup.costs.seconds_per_token:
        here = setup.costs.speed(index)
        return _by_effect(setup, index, lambda at: value * setup.costs.speed(at) / here, limit, (_AIM, _KNOWN_CALM))
    if signal == "memory" and setup.frees_memory:
        resident = setup.costs.resident
        return _by_effect(setup, index, lambda at: value + resident[at] - resident[index], limit, (_AIM, _KNOWN_CALM))
    # a signal that is twice its limit asks for two steps, four times for three
    steps = 1 + int(math.log2(max(value / limit, 1.0))) if value < math.inf else setup.last
    # behind the knee little time is left to gain, so only a wait that is far beyond its limit goes there
    furthest = setup.knee if signal == "queue_wait" and value < _DESPERATE * limit else setup.last
    return Judgement(
        above=value > limit,
        calm=value < setup.policy.lower * limit,
        down_to=max(min(index + steps, furthest), index),
        up_to=max(index - setup.policy.steps_up, 0),
    )


def _cheapest(setup: Setup, load: float) -> int:
    """The index of the least KL and price of congestion together; the last if the load is too much for any."""
    best, least = setup.last, math.inf
    price = setup.policy.price * setup.costs.kl[setup.knee]
    for at in range(setup.last + 1):
        used = load * setup.costs.speed(at)
        if used >= 1:
            continue
        cost = setup.costs.kl[at] + price * used**_POWER / (1 - used)
        if cost < least:
            best, least = at, cost
    return best


def _by_effect(
    setup: Setup, index: int, expected: Callable[[int], float], limit: float, shares: tuple[float, float]
) -> Judgement:
    """A judgement by what the signal is expected to be at each index.

    Args:
        setup: the limits and costs.
        index: the present index.
        expected: the signal's value at an index, given its value now.
        limit: its limit.
        shares: of the limit, what is aimed at when precision falls, and what is allowed when it rises.
    """
    aim, calm = shares
    every = range(setup.last + 1)
    down_to = next((at for at in every if at > index and expected(at) <= aim * limit), setup.last)
    up_to = next((at for at in range(index) if expected(at) <= calm * limit), index)
    return Judgement(above=expected(index) > limit, calm=up_to < index, down_to=max(down_to, index), up_to=up_to)


def integrated(setup: Setup, integral: float, power: float, index: int, seconds: float) -> float:
    """The slow integral of relative excess power, in indices.

    An error within the deadband counts as none. The integral stays within one step of the present index, so that it
    does not wind up while another signal, the floor or a dwell keeps the index elsewhere.

    Args:
        setup: the limits and constants.
        integral: the integral so far.
        power: watts now.
        index: the present index.
        seconds: since the last observation.
    """
    limit = setup.given["power"]
    error = (power - limit) / limit
    if abs(error) <= setup.policy.deadband:
        return integral
    # far above the limit the error is bounded, so that one glitch of the sensor is not a jump
    moved = integral + setup.policy.power_gain * max(min(error, 1.0), -1.0) * seconds
    near = min(max(moved, index - 1.0), index + 1.0)
    return min(max(near, 0.0), float(setup.last))
