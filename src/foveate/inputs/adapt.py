"""adapt_to_input: each input chooses between two neighbouring maps, weight by weight, at a given mean of bits.

The choice itself is made inside the op (`foveate.kernels.planes.choice`). Here is what comes before it and beside it:

1. gradients of the outputs, measured on a few batches (`foveate.inputs.gradients`);
2. a frontier with maps a quarter of a bit below and above the target, where none is in force;
3. the price of a byte at which the mean bits meet the target, found with the very estimates that decide
   (`foveate.inputs.multiplier`), since a price from exact errors would miss the target;
4. a verdict on held-out batches, beside the best static map at the same bits (`foveate.inputs.verdict`);
5. while the model runs, a slow correction of the price, after every few thousand rows.

Wider pairs of maps lose: mixing far points of a convex frontier costs more than knowing the input brings.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from foveate.allocate import allocate, frontier
from foveate.collect.evaluation import evaluating
from foveate.collect.objectives import Objective, check_batches, named, run
from foveate.errors import BudgetError, DataError
from foveate.inputs.gradients import output_gradients
from foveate.inputs.multiplier import Correction, Shares, corrected, solved
from foveate.inputs.observe import Observed, observing
from foveate.inputs.verdict import Verdict, as_decided, divergences, ratio_interval, static
from foveate.nn.closing import Closing
from foveate.nn.levels import apply, set_adaptation, set_index, withdraw
from foveate.nn.registry import profile_of, quantized_part, registry_of
from foveate.precision.adaptation import Adaptation, Estimator
from foveate.precision.budgets import Budget
from foveate.precision.frontiers import Frontier
from foveate.precision.profiles import Profile
from foveate.precision.state import Composed
from foveate.progress import say, track

#: Maps of a frontier that is made here.
_POINTS = 160
#: Batches that gradients are measured on, and those that estimates are compared with true errors on.
_GRADIENT_BATCHES, _RATIO_BATCHES = 4, 1
_ROUNDS = 4
#: How near the mean bits come to the target on the calibration data.
_NEAR = 0.002
_NUMBERS = itertools.count(1)


class InputAdaptation(Closing):
    """Inputs of a model that choose, made by `adapt_to_input`. A context manager; leaving it withdraws the choice.

    Attributes:
        frontier: the maps among which inputs choose two.
        verdict: what was measured beside the static map; None if that was not asked for.
        correction: the state of the correction that holds the mean bits.
    """

    def __init__(self, model: nn.Module, chain: Frontier, adaptation: Adaptation, correction: Correction) -> None:
        self.frontier, self.correction = chain, correction
        self.verdict: Verdict | None = None
        self._registry, self._model = registry_of(model), model
        self._decider = f"adapt_to_input {next(_NUMBERS)}"
        self._adaptation = adaptation
        self._seen: tuple[Tensor | None, Tensor | None] = (None, None)
        self._hook = quantized_part(model).register_forward_hook(self._end)
        self._holding = False

    def put(self, index: int, adaptation: Adaptation) -> None:
        """Put the frontier, its index and the choice in force."""
        state = self._registry.generations.state
        if state is None or state.frontier is not self.frontier:
            apply(self._model, self.frontier, decider=self._decider)
        set_index(self._model, index, decider=self._decider)
        self.renew(adaptation)

    def renew(self, adaptation: Adaptation) -> None:
        """Put another price, or other estimates, in force."""
        self._adaptation = adaptation
        set_adaptation(self._model, adaptation, decider=self._decider)

    def tally(self) -> tuple[float, float]:
        """(samples, mean bits) of the rows that were decided since the last call; (0, NaN) if none were.

        Rows with requests of their own are not counted, nor those of passes that began before levels last changed.
        """
        composed = self._registry.generations.composed
        pair = None if composed is None else composed.pairs[0]
        counts = self._registry.generations.counts.get(pair) if pair is not None else None
        if counts is None or composed is None or pair is None:
            return 0.0, float("nan")
        now = counts.clone()
        before = self._seen[1] if self._seen[0] is counts and self._seen[1] is not None else torch.zeros_like(now)
        self._seen = (counts, now)
        return self._samples_and_bits(now - before, composed, pair)

    def _samples_and_bits(self, counts: Tensor, composed: Composed, pair: tuple[int, int]) -> tuple[float, float]:
        """(samples, mean bits) of the rows that `counts` [weights, 2] counted."""
        decided, high = counts.unbind(1)
        low, better = (composed.maps[number] for number in pair)
        names = [site.name for site in low.weight_sites()]
        shares = {n: h / d for n, d, h in zip(names, decided.tolist(), high.tolist(), strict=True) if d}
        rows = self._adaptation.estimator.rows
        samples = max((d / rows.get(n, 1.0) for n, d in zip(names, decided.tolist(), strict=True)), default=0.0)
        return samples, Shares.between(low, better).bits(shares)

    @property
    def present_bits(self) -> float | None:
        """The mean bits of the rows that were decided since levels last changed; None before the first one. Reading it
        changes nothing, in any thread.
        """
        generations = self._registry.generations
        composed, counted = generations.composed, generations.counts
        pair = None if composed is None else composed.pairs[0]
        if composed is None or pair is None or pair not in counted:
            return None
        samples, bits = self._samples_and_bits(counted[pair].clone(), composed, pair)
        return bits if samples else None

    @property
    def bits(self) -> float:
        """The mean bits of a weight over all rows that were decided since the calibration."""
        return self.correction.mean

    @property
    def adaptation(self) -> Adaptation:
        """What is in force: offsets, price and estimator."""
        return self._adaptation

    def correct(self) -> None:
        """Take a step of the correction now. Eager calls of the model do so by themselves, compiled ones do not.

        Where another decider has moved the index, or a floor has cut the lower map off, the mean bits are theirs to
        decide, and nothing is corrected.
        """
        samples, bits = self.tally()
        state = self._registry.generations.state
        own = self._adaptation.around(self.index, len(self.frontier) - 1)
        if state is None or state.frontier is not self.frontier or state.ends[0] != own:
            return
        self.correction = corrected(self.correction, round(samples), bits)
        if self.correction.multiplier != self._adaptation.multiplier:
            self.renew(replace(self._adaptation, multiplier=self.correction.multiplier))

    def give_index_back(self) -> None:
        """Demand no index any more: the two maps stand around whatever index others demand, at the same price."""
        set_index(self._model, 0, decider=self._decider)

    def hold(self) -> None:
        """Correct the price from now on, whenever enough rows were decided."""
        self.tally()
        self._holding = True

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling() or not self._holding:
            return
        composed = self._registry.generations.composed
        counts = self._registry.generations.counts.get(composed.pairs[0]) if composed is not None else None
        if counts is None:
            return
        before = self._seen[1] if self._seen[0] is counts else None
        new = counts[:, 0] if before is None else counts[:, 0] - before[:, 0]
        if len(new) and int(new.max()) >= self.correction.every:
            self.correct()

    def close(self) -> None:
        """End the choice: the model is read as it would be without it."""
        self._hook.remove()
        withdraw(self._model, self._decider)

    def __str__(self) -> str:
        low, high = self._adaptation.around(self.index, len(self.frontier) - 1)
        said = "" if self.verdict is None else f"; {self.verdict}"
        return (
            f"{self.correction.target:g} bits on average, between {self.frontier.bits(low):.3f} and "
            f"{self.frontier.bits(high):.3f}; {self.bits:.3f} so far{said}"
        )

    @property
    def index(self) -> int:
        """The index of the frontier that the target is at."""
        return nearest(self.frontier, self.correction.target)

    @property
    def span(self) -> float:
        """How many bits lie between the two maps around the target."""
        low, high = self._adaptation.around(self.index, len(self.frontier) - 1)
        return self.frontier.bits(high) - self.frontier.bits(low)


def adapt_to_input(
    model: nn.Module,
    *,
    bits: float,
    batches: Iterable[Any],
    objective: Objective | None = None,
    spread: float = 0.25,
    strips: int = 4,
    verdict: bool = True,
    progress: bool = True,
) -> InputAdaptation:
    """Let each input choose the precision of each weight, so that `bits` are read of a weight on average.

    Every row of inputs (a token, a patch of an image) reads each weight at one of two maps, a little cheaper and a
    little better than the target. It reads the better one where an estimate of the loss that it saves is worth its
    bytes. A row's choice does not depend on its batch. The mean is found on the data given, and a slow correction holds
    it.

        with fv.adapt_to_input(model, bits=4.0, batches=batches) as adapted:
            print(adapted.verdict)
            model.generate(**inputs)
            print(adapted.bits)

    Weights of embeddings that are only looked up, and of convolutions in groups, read the better of the two maps.

    Args:
        model: a quantized model with its profile, and with the planes of the better map.
        bits: average bits of a weight, scales included (`PrecisionMap.bits`).
        batches: data like those that the model will see, as for `foveate.quantize`; at least one batch. The last
            quarter of them is held out for the verdict.
        objective: what should stay the same; by default that of the profile.
        spread: how many bits below and above the target the two maps are.
        strips: how many strips of 16 outputs are read for the estimate of each weight: more are more exact, and take
            longer.
        verdict: whether to measure if adapting pays. If it does not, a line says so, and `verdict.pays` is False; the
            choice stays in force until it is closed.
        progress: whether to show progress bars.

    Returns:
        The adaptation, a context manager. `close()` ends it.

    Raises:
        BudgetError: the frontier has no two maps around the target.
        DataError: there are no batches.
        FoveateError: the model is not quantized, or has no profile.
    """
    given = list(check_batches(batches))
    if not given:
        raise DataError("there are no batches to find the price of a byte on: give at least one")
    if not spread > 0:
        raise BudgetError(f"spread (={spread!r}) is not a positive number of bits")
    profile = profile_of(model)
    objective = objective or named(profile.objective)
    if objective is None:
        raise DataError(f"the objective of the profile (={profile.objective!r}) is not known: give objective=")
    chain, index, (below, above) = _pair(model, profile, bits, spread)
    held = len(given) // 4
    seen = given[: len(given) - held]
    adapted = InputAdaptation(
        model,
        chain,
        Adaptation(below=below, above=above, multiplier=1.0, estimator=Estimator(gradients={})),
        Correction(target=bits, span=chain.bits(index - above) - chain.bits(index + below)),
    )
    try:
        adapted.put(index, adapted.adaptation)
        gradients = output_gradients(model, seen[:_GRADIENT_BATCHES], objective, progress=progress)
        estimator = Estimator(gradients=gradients.squares, losses=profile.losses, strips=strips, rows=gradients.rows)
        adapted.renew(replace(adapted.adaptation, estimator=estimator))
        while True:
            try:
                _calibrate(model, adapted, seen, progress)
                break
            except BudgetError:
                # weights that do not choose read the higher map: the lower one is further away where they are many
                below = adapted.adaptation.below
                if index + below >= len(chain) - 1:
                    raise
                adapted.renew(replace(adapted.adaptation, multiplier=1.0, below=2 * below, estimator=estimator))
                adapted.correction = replace(adapted.correction, span=adapted.span)
        if verdict:
            adapted.verdict = _verdict(model, adapted, given[-held:] if held else seen, objective, progress)
            if not adapted.verdict.pays:
                say(f"adapt_to_input: {adapted.verdict}")
        adapted.hold()
    except BaseException:
        adapted.close()
        raise
    return adapted


def nearest(chain: Frontier, bits: float) -> int:
    """The index of the map of a frontier whose average bits are nearest."""
    return min(range(len(chain)), key=lambda i: abs(chain.bits(i) - bits))


def _pair(model: nn.Module, profile: Profile, bits: float, spread: float) -> tuple[Frontier, int, tuple[int, int]]:
    """The frontier, the index of the target on it, and the offsets of the two maps: of the frontier in force, where it
    has maps near enough.
    """
    state = registry_of(model).generations.state
    chains = [] if state is None else [state.frontier]
    for chain in (*chains, frontier(profile, _POINTS)):
        index = nearest(chain, bits)
        low, high = nearest(chain, bits - spread), nearest(chain, bits + spread)
        reached = chain.bits(low) <= bits - spread / 2 and chain.bits(high) >= bits + spread / 2
        if reached and high < index < low and chain.bits(high) - chain.bits(low) <= 3 * spread:
            return chain, index, (low - index, index - high)
    ends = f"{chain.bits(len(chain) - 1):.3f} to {chain.bits(0):.3f}"
    raise BudgetError(f"bits (={bits:g}) has no maps {spread:g} bits below and above it on the frontier, {ends}")


def _calibrate(model: nn.Module, adapted: InputAdaptation, batches: Sequence[Any], progress: bool) -> None:
    """Find the price at which the mean bits meet the target, with the estimates that decide."""
    sums: dict[str, list[float]] = {}

    def compare(found: Observed) -> None:
        if found.true_errors is not None:
            pair = sums.setdefault(found.site, [0.0, 0.0])
            pair[0] += float(found.true_errors.double().sum())
            pair[1] += float(found.errors.double().sum())

    _run(model, batches[:_RATIO_BATCHES], compare, True, progress)
    ratios = {name: true / found for name, (true, found) in sums.items() if found > 0 and true > 0}
    adaptation = adapted.adaptation
    adaptation = replace(adaptation, estimator=replace(adaptation.estimator, ratios=ratios))
    adapted.renew(adaptation)
    low, high = adaptation.around(adapted.index, len(adapted.frontier) - 1)
    shares = Shares.between(adapted.frontier[low], adapted.frontier[high])
    for _ in range(_ROUNDS):
        errors: dict[str, list[Tensor]] = {}
        adapted.tally()
        _run(
            model,
            batches,
            lambda found, into=errors: into.setdefault(found.site, []).append(found.errors),
            False,
            progress,
        )
        _, bits = adapted.tally()
        if abs(bits - adapted.correction.target) <= _NEAR * adapted.correction.target:
            break
        choice = replace(adaptation, multiplier=1.0).choice(adapted.frontier, low, high)
        names = [site.name for site in adapted.frontier[low].weight_sites()]
        unit = dict(zip(names, choice.thresholds, strict=True))
        collected = {name: torch.cat(parts) for name, parts in errors.items() if name in adaptation.estimator.gradients}
        multiplier = solved(shares, collected, unit, adapted.correction.target)
        adaptation = replace(adaptation, multiplier=multiplier)
        adapted.renew(adaptation)
    adapted.correction = replace(adapted.correction, multiplier=adaptation.multiplier)


def _run(model: nn.Module, batches: Sequence[Any], take: Any, true_errors: bool, progress: bool) -> None:
    with evaluating(model), torch.no_grad(), observing(model, take, true_errors=true_errors):
        for batch in track(batches, "finding the price of a byte", show=progress):
            run(model, batch)


def _verdict(
    model: nn.Module, adapted: InputAdaptation, batches: Sequence[Any], objective: Objective, progress: bool
) -> Verdict:
    plan = allocate(profile_of(model), Budget(bits=adapted.correction.target))
    tallies: list[tuple[float, float]] = []
    ways = (as_decided(model, lambda: tallies.append(adapted.tally())), static(model, plan))
    ours_n, theirs_n = divergences(model, batches, objective, ways, progress=progress)
    samples = sum(count for count, _ in tallies)
    return Verdict(
        adapting=float(ours_n.double().mean()),
        static=float(theirs_n.double().mean()),
        interval=ratio_interval(ours_n, theirs_n),
        bits=sum(count * bits for count, bits in tallies if count) / max(samples, 1e-300),
        static_bits=plan.bits,
        samples=len(ours_n),
        unit=objective.unit,
    )
