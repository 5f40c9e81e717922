"""adapt_to_input: each input chooses between two neighbouring maps, weight by weight, at a given mean.

The choice itself is made inside the op (`foveate.kernels.planes.choice`). Here is what comes before it and beside it:

1. gradients of the outputs, measured on a few batches (`foveate.inputs.gradients`);
2. a frontier with maps a quarter of a bit below and above the target, where none is in force;
3. the price of a bit, a byte or a second at which the mean meets the target, found with the very estimates that decide
   (`foveate.inputs.multiplier`), since a price from exact errors would miss the target;
4. if asked for, factors of the estimates, measured at the output (`foveate.inputs.feedback`), and the price anew;
5. a verdict on held-out batches, beside the best static map at the same cost (`foveate.inputs.verdict`);
6. while the model runs, a slow correction of the price, after every few thousand rows.

Wider pairs of maps lose: mixing far points of a convex frontier costs more than knowing the input brings.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from foveate.allocate import allocate, frontier
from foveate.collect.objectives import Objective, check_batches, named
from foveate.errors import BudgetError, DataError
from foveate.inputs.gradients import output_gradients
from foveate.inputs.input_adaptation import InputAdaptation, Tally
from foveate.inputs.verdict import Verdict, as_decided, divergences, ratio_interval, static
from foveate.nn.registry import profile_of, registry_of
from foveate.precision.adaptation import Adaptation, Estimator
from foveate.precision.budgets import Budget
from foveate.precision.costs import Bits, BytesRead, Cost, Seconds
from foveate.precision.frontiers import Frontier
from foveate.precision.maps import PrecisionMap
from foveate.precision.profiles import Profile
from foveate.progress import say

#: Maps of a frontier that is made here.
_POINTS = 160
#: Batches that gradients are measured on, and those that are measured at the output.
_GRADIENT_BATCHES, _FEEDBACK_BATCHES = 4, 4


@dataclass(frozen=True, kw_only=True)
class AdaptOptions:
    """How inputs choose.

        fv.adapt_to_input(model, bits=4.0, batches=batches, options=fv.AdaptOptions(feedback=True))

    Attributes:
        spread: how many bits below and above the target the two maps are; of another target as much of it as so many
            bits take on average.
        strips: how many strips of 16 outputs are read for the estimate of each weight: more are more exact, and take
            longer.
        feedback: whether the thresholds of weights are refined by what they do at the output, measured on a few batches
            (`foveate.inputs.feedback`). For each weight that takes two more passes over these.
        verdict: whether to measure if adapting pays. If it does not, a line says so, and `verdict.pays` is False; the
            choice stays in force until it is closed.

    Raises:
        BudgetError: `spread` is not a positive number of bits, or `strips` not a positive whole number.
    """

    spread: float = 0.25
    strips: int = 4
    feedback: bool = False
    verdict: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.spread < math.inf:
            raise BudgetError(f"spread (={self.spread!r}) is not a positive number of bits")
        if type(self.strips) is not int or self.strips < 1:
            raise BudgetError(f"strips (={self.strips!r}) is not a whole number from 1 on")


DEFAULT_OPTIONS = AdaptOptions()


def adapt_to_input(
    model: nn.Module,
    *,
    bits: float | None = None,
    bytes: int | str | None = None,
    seconds: float | str | None = None,
    batches: Iterable[Any],
    objective: Objective | None = None,
    options: AdaptOptions = DEFAULT_OPTIONS,
    progress: bool = True,
) -> InputAdaptation:
    """Let each input choose the precision of each weight, so that `bits` are read of a weight on average.

    Every row of inputs (a token, a patch of an image) reads each weight at one of two maps, a little cheaper and a
    little better than the target. It reads the better one where an estimate of the loss that it saves is worth what it
    costs. A row's choice does not depend on its batch. The mean is found on the data given, and a slow correction holds
    it.

        with fv.adapt_to_input(model, bits=4.0, batches=batches) as adapted:
            print(adapted.verdict)
            model.generate(**inputs)
            print(adapted.bits)

    The average is given in one of three units, which also price each weight. Weights of embeddings that are only looked
    up, and of convolutions in groups, read the better of the two maps.

    Args:
        model: a quantized model with its profile, and with the planes of the better map.
        bits: average bits of a weight, scales included (`PrecisionMap.bits`); or
        bytes: bytes that a token reads on average (`PrecisionMap.bytes_read`), a number or `"800MiB"`; or
        seconds: the average time of a token, or of a sample of a model without tokens, by the profile's timings
            (`foveate.measure_timings`), a number or `"30ms"`. What the estimates take is not in it.
        batches: data like those that the model will see, as for `foveate.quantize`; at least one batch. The last
            quarter of them is held out for the verdict.
        objective: what should stay the same; by default that of the profile.
        options: how inputs choose.
        progress: whether to show progress bars.

    Returns:
        The adaptation, a context manager. `close()` ends it.

    Raises:
        BudgetError: not exactly one of bits, bytes and seconds is given, the frontier has no two maps around it, or
            the profile has no timings for `seconds`.
        DataError: there are no batches.
        FoveateError: the model is not quantized, or has no profile.
    """
    given = list(check_batches(batches))
    if not given:
        raise DataError("there are no batches to find the price on: give at least one")
    profile = profile_of(model)
    objective = objective or named(profile.objective)
    if objective is None:
        raise DataError(f"the objective of the profile (={profile.objective!r}) is not known: give objective=")
    cost, target = _target(bits, bytes, seconds, profile)
    chain, index, (below, above) = _pair(model, profile, cost, target, options.spread)
    held = len(given) // 4
    seen = given[: len(given) - held]
    estimator = Estimator(gradients={}, losses=profile.losses, strips=options.strips, cost=cost)
    adaptation = Adaptation(below=below, above=above, multiplier=1.0, estimator=estimator)
    adapted = InputAdaptation(model, chain, index, adaptation, target=target, objective=objective)
    try:
        adapted.put()
        gradients = output_gradients(model, seen[:_GRADIENT_BATCHES], objective, progress=progress)
        estimator = replace(estimator, gradients=gradients.squares, rows=gradients.rows)
        adapted.renew(replace(adaptation, estimator=estimator))
        while True:
            try:
                adapted.find_price(seen, progress=progress)
                break
            except BudgetError:
                # weights that do not choose read the higher map: the lower one is further away where they are many
                if not adapted.widen():
                    raise
        if options.feedback:
            adapted.measure_factors(seen[:_FEEDBACK_BATCHES], progress=progress)
            adapted.find_price(seen, progress=progress)
        if options.verdict:
            adapted.verdict = _verdict(model, adapted, given[-held:] if held else seen, progress)
            if not adapted.verdict.pays:
                say(f"adapt_to_input: {adapted.verdict}")
        adapted.hold()
    except BaseException:
        adapted.close()
        raise
    return adapted


def _target(
    bits: float | None, bytes: int | str | None, seconds: float | str | None, profile: Profile
) -> tuple[Cost, float]:
    """The unit of the average that is asked for, and its amount."""
    asked = [name for name, value in (("bits", bits), ("bytes", bytes), ("seconds", seconds)) if value is not None]
    if len(asked) != 1:
        raise BudgetError(f"give exactly one of bits, bytes and seconds; given: {', '.join(asked) or 'none'}")
    if bits is not None:
        return Bits(), float(Budget(bits=bits).bits or 0)
    if bytes is not None:
        return BytesRead(), float(Budget(bytes=bytes).bytes or 0)
    if profile.timings is None:
        raise BudgetError(
            "the profile has no times: foveate.measure_timings(model, batch) measures them on this machine"
        )
    return Seconds(profile.timings), float(Budget(latency=seconds).latency or 0)


def nearest(chain: Frontier, bits: float) -> int:
    """The index of the map of a frontier whose average bits are nearest."""
    return _nearest([chain.bits(i) for i in range(len(chain))], bits)


def _nearest(values: Sequence[float], wanted: float) -> int:
    return min(range(len(values)), key=lambda i: abs(values[i] - wanted))


def _pair(
    model: nn.Module, profile: Profile, cost: Cost, target: float, spread: float
) -> tuple[Frontier, int, tuple[int, int]]:
    """The frontier, the index of the target on it, and the offsets of the two maps: of the frontier in force, where it
    has maps near enough.
    """
    state = registry_of(model).generations.state
    timings = cost.timings if isinstance(cost, Seconds) else None
    chains = [] if state is None else [state.frontier]
    for chain in (*chains, frontier(profile, _POINTS, timings=timings)):
        # a frontier keeps its bits
        costs = [chain.bits(i) if isinstance(cost, Bits) else cost.of(plan) for i, plan in enumerate(chain)]
        of_bits = chain.bits(0) - chain.bits(len(chain) - 1)
        away = spread * (costs[0] - costs[-1]) / of_bits if of_bits > 0 else 0.0  # the spread in the unit of the target
        index, low, high = (_nearest(costs, wanted) for wanted in (target, target - away, target + away))
        reached = costs[low] <= target - away / 2 and costs[high] >= target + away / 2
        if reached and high < index < low and costs[high] - costs[low] <= 3 * away:
            return chain, index, (low - index, index - high)
    ends = f"{cost.text(costs[-1])} to {cost.text(costs[0])}"
    raise BudgetError(f"a target of {cost.text(target)} has no maps {spread:g} bits around it on the frontier, {ends}")


def static_map(profile: Profile, cost: Cost, target: float) -> PrecisionMap:
    """The static map of least predicted loss that takes as much as a target."""
    if isinstance(cost, Bits):
        return allocate(profile, Budget(bits=target))
    if isinstance(cost, Seconds):
        return allocate(profile, Budget(latency=target))
    # bytes that a token reads rise with bits: the bits between the two nearest maps of a frontier
    chain = frontier(profile, _POINTS)
    read = [cost.of(plan) for plan in chain]
    below = next((i for i, taken in enumerate(read) if taken <= target), len(chain) - 1)
    above = max(below - 1, 0)
    share = (target - read[below]) / (read[above] - read[below]) if read[above] > read[below] else 0.0
    bits = chain.bits(below) + min(max(share, 0.0), 1.0) * (chain.bits(above) - chain.bits(below))
    return allocate(profile, Budget(bits=bits))


def _verdict(model: nn.Module, adapted: InputAdaptation, batches: Sequence[Any], progress: bool) -> Verdict:
    plan = static_map(profile_of(model), adapted.adaptation.estimator.cost, adapted.correction.target)
    objective, tallies = adapted.objective, list[Tally]()
    ways = (as_decided(model, lambda: tallies.append(adapted.tally())), static(model, plan))
    ours_n, theirs_n = divergences(model, batches, objective, ways, progress=progress)
    samples = sum(tally.samples for tally in tallies)
    return Verdict(
        adapting=float(ours_n.double().mean()),
        static=float(theirs_n.double().mean()),
        interval=ratio_interval(ours_n, theirs_n),
        bits=sum(tally.samples * tally.bits for tally in tallies if tally.samples) / max(samples, 1e-300),
        static_bits=plan.bits,
        samples=len(ours_n),
        unit=objective.unit,
    )
