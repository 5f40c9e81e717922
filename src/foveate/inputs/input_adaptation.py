"""InputAdaptation: inputs of a live model that choose, with the price that holds their mean cost at its target.

`foveate.adapt_to_input` makes one. While the model runs eagerly, a slow correction of the price acts after every few
thousand rows; `find_price` finds it anew on data, and `refine` also measures what estimates are worth at the output.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from foveate.collect.evaluation import evaluating
from foveate.collect.objectives import Objective, run
from foveate.inputs.feedback import factors_of, output_effects
from foveate.inputs.multiplier import Correction, Shares, corrected, solved
from foveate.inputs.observe import Observed, observing
from foveate.inputs.verdict import Verdict
from foveate.nn.closing import Closing
from foveate.nn.levels import apply, set_adaptation, set_index, withdraw
from foveate.nn.registry import quantized_part, registry_of
from foveate.precision.adaptation import Adaptation
from foveate.precision.costs import Bits
from foveate.precision.frontiers import Frontier
from foveate.precision.state import Composed
from foveate.progress import track

#: Batches on which estimates are compared with true errors, and rounds in which a price is found.
_RATIO_BATCHES, _ROUNDS = 1, 4
_NUMBERS = itertools.count(1)


class Tally(NamedTuple):
    """What some rows read.

    Attributes:
        samples: how many samples the rows belong to.
        bits: their mean bits of a weight.
        spent: their mean cost, in the unit of the target.
    """

    samples: float
    bits: float
    spent: float


class InputAdaptation(Closing):
    """Inputs of a model that choose, made by `adapt_to_input`. A context manager; leaving it withdraws the choice.

    Attributes:
        frontier: the maps among which inputs choose two.
        index: the index of the frontier that the target is at.
        objective: what should stay the same.
        verdict: what was measured beside the static map; None if that was not asked for.
        correction: the state of the correction that holds the mean cost.
    """

    def __init__(
        self,
        model: nn.Module,
        chain: Frontier,
        index: int,
        adaptation: Adaptation,
        *,
        target: float,
        objective: Objective,
    ) -> None:
        self.frontier, self.index, self.objective = chain, index, objective
        self.verdict: Verdict | None = None
        self._registry, self._model = registry_of(model), model
        self._decider = f"adapt_to_input {next(_NUMBERS)}"
        self._adaptation = adaptation
        self._seen: tuple[Tensor | None, Tensor | None] = (None, None)
        self._hook = quantized_part(model).register_forward_hook(self._end)
        self._holding = False
        self._bits = (0, 0.0)  # rows that were decided since the calibration, and the sum of their bits
        self.correction = Correction(target=target, span=self.span)

    def put(self) -> None:
        """Put the frontier, the index of the target and the choice in force."""
        state = self._registry.generations.state
        if state is None or state.frontier is not self.frontier:
            apply(self._model, self.frontier, decider=self._decider)
        set_index(self._model, self.index, decider=self._decider)
        self.renew(self._adaptation)

    def renew(self, adaptation: Adaptation) -> None:
        """Put another price, or other estimates, in force."""
        self._adaptation = adaptation
        set_adaptation(self._model, adaptation, decider=self._decider)

    def tally(self) -> Tally:
        """Of the rows that were decided since the last call; no samples, and means that are NaN, if none were.

        Rows with requests of their own are not counted, nor those of passes that began before levels last changed.
        """
        composed = self._registry.generations.composed
        pair = None if composed is None else composed.pairs[0]
        counts = self._registry.generations.counts.get(pair) if pair is not None else None
        if counts is None or composed is None or pair is None:
            return Tally(0.0, float("nan"), float("nan"))
        now = counts.clone()
        before = self._seen[1] if self._seen[0] is counts and self._seen[1] is not None else torch.zeros_like(now)
        self._seen = (counts, now)
        return self._of_counts(now - before, composed, pair)

    def _of_counts(self, counts: Tensor, composed: Composed, pair: tuple[int, int]) -> Tally:
        """Of the rows that `counts` [weights, 2] counted."""
        decided, high = counts.unbind(1)
        low, better = (composed.maps[number] for number in pair)
        names = [site.name for site in low.weight_sites()]
        shares = {n: h / d for n, d, h in zip(names, decided.tolist(), high.tolist(), strict=True) if d}
        rows = self._adaptation.estimator.rows
        samples = max((d / rows.get(n, 1.0) for n, d in zip(names, decided.tolist(), strict=True)), default=0.0)
        bits, cost = Shares.between(low, better).mean(shares), self._adaptation.estimator.cost
        spent = bits if isinstance(cost, Bits) else Shares.between(low, better, cost).mean(shares)
        return Tally(samples, bits, spent)

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
        found = self._of_counts(counted[pair].clone(), composed, pair)
        return found.bits if found.samples else None

    @property
    def bits(self) -> float:
        """The mean bits of a weight over all rows that were decided since the calibration; before any, the target, or
        the bits of its index where the target is in another unit.
        """
        rows, total = self._bits
        if rows:
            return total / rows
        return self.spent if isinstance(self._adaptation.estimator.cost, Bits) else self.frontier.bits(self.index)

    @property
    def spent(self) -> float:
        """The mean over the same rows of what the target counts: bits, bytes or seconds."""
        return self.correction.mean

    @property
    def adaptation(self) -> Adaptation:
        """What is in force: offsets, price, estimator and factors."""
        return self._adaptation

    def correct(self) -> None:
        """Take a step of the correction now. Eager calls of the model do so by themselves, compiled ones do not.

        Where another decider has moved the index, or a floor has cut the lower map off, the mean cost is theirs to
        decide, and nothing is corrected.
        """
        samples, bits, spent = self.tally()
        state = self._registry.generations.state
        own = self._adaptation.around(self.index, len(self.frontier) - 1)
        if state is None or state.frontier is not self.frontier or state.ends[0] != own:
            return
        before = self.correction
        self.correction = corrected(before, round(samples), spent)
        rows, total = self._bits
        more = self.correction.rows - before.rows
        self._bits = (rows + more, total + more * bits if more else total)
        if self.correction.multiplier != self._adaptation.multiplier:
            self.renew(replace(self._adaptation, multiplier=self.correction.multiplier))

    def give_index_back(self) -> None:
        """Demand no index any more: the two maps stand around whatever index others demand, at the same price."""
        set_index(self._model, 0, decider=self._decider)

    def find_price(self, batches: Sequence[Any], *, progress: bool = True) -> None:
        """Find the price at which the mean cost meets the target, with the estimates that decide.

        Args:
            batches: data, as for `foveate.quantize`.
            progress: whether to show a progress bar.

        Raises:
            BudgetError: the two maps cannot meet the target.
        """
        sums: dict[str, list[float]] = {}

        def compare(found: Observed) -> None:
            if found.true_errors is not None:
                pair = sums.setdefault(found.site, [0.0, 0.0])
                pair[0] += float(found.true_errors.double().sum())
                pair[1] += float(found.errors.double().sum())

        self._observe(batches[:_RATIO_BATCHES], compare, True, progress)
        known = self._adaptation.estimator.ratios  # which the estimates have in them already
        ratios = {n: known.get(n, 1.0) * true / found for n, (true, found) in sums.items() if found > 0 and true > 0}
        self.renew(replace(self._adaptation, estimator=replace(self._adaptation.estimator, ratios=ratios)))
        low, high = self._adaptation.around(self.index, len(self.frontier) - 1)
        estimator, target = self._adaptation.estimator, self.correction.target
        shares = Shares.between(self.frontier[low], self.frontier[high], estimator.cost)
        names = [site.name for site in self.frontier[low].weight_sites()]
        for _ in range(_ROUNDS):
            errors: dict[str, list[Tensor]] = {}
            self.tally()

            def keep(found: Observed, into: dict[str, list[Tensor]] = errors) -> None:
                into.setdefault(found.site, []).append(found.errors)

            self._observe(batches, keep, False, progress)
            if abs(self.tally().spent - target) <= self.correction.tolerance * self.correction.span:
                break
            choice = replace(self._adaptation, multiplier=1.0).choice(self.frontier, low, high)
            unit = dict(zip(names, choice.thresholds, strict=True))
            collected = {name: torch.cat(parts) for name, parts in errors.items() if name in estimator.gradients}
            self.renew(replace(self._adaptation, multiplier=solved(shares, collected, unit, target)))
        self.correction = replace(self.correction, multiplier=self._adaptation.multiplier)

    def refine(self, batches: Sequence[Any], *, progress: bool = True) -> None:
        """Measure at the output what each weight's estimates are worth, and find the price anew: see
        `foveate.inputs.feedback`. `AdaptOptions(feedback=True)` does it once; call it again with what came lately.

        For each weight it takes two passes over the batches, in which single weights are forced to one of their maps
        for all callers of the model.

        Args:
            batches: data, as for `foveate.quantize`.
            progress: whether to show progress bars.

        Raises:
            BudgetError: the two maps cannot meet the target.
        """
        holding, self._holding = self._holding, False
        try:
            self.measure_factors(batches, progress=progress)
            self.find_price(batches, progress=progress)
            self.tally()
        finally:
            self._holding = holding

    def measure_factors(self, batches: Sequence[Any], *, progress: bool = True) -> None:
        """Put the factors in force that the batches show at the output, at the price as it is; see `refine`."""
        effects = output_effects(self._model, self._adaptation, self.renew, batches, self.objective, progress)
        self.renew(replace(self._adaptation, factors=factors_of(effects)))

    def widen(self) -> bool:
        """Take the lower map further away, and begin the price anew; False if it is the last one already."""
        below = self._adaptation.below
        if self.index + below >= len(self.frontier) - 1:
            return False
        self.renew(replace(self._adaptation, multiplier=1.0, below=2 * below))
        self.correction = replace(self.correction, span=self.span)
        return True

    def _observe(self, batches: Sequence[Any], take: Any, true_errors: bool, progress: bool) -> None:
        with evaluating(self._model), torch.no_grad(), observing(self._model, take, true_errors=true_errors):
            for batch in track(batches, "finding the price", show=progress):
                run(self._model, batch)

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
        cost = self._adaptation.estimator.cost
        so_far = f"{self.bits:.3f}" if isinstance(cost, Bits) else f"{cost.text(self.spent)} and {self.bits:.3f} bits"
        return (
            f"{cost.text(self.correction.target)} on average, between {self.frontier.bits(low):.3f} and "
            f"{self.frontier.bits(high):.3f} bits; {so_far} so far{said}"
        )

    @property
    def span(self) -> float:
        """What the two maps around the target differ by, in the unit of the target."""
        low, high = self._adaptation.around(self.index, len(self.frontier) - 1)
        cost = self._adaptation.estimator.cost
        return cost.of(self.frontier[high]) - cost.of(self.frontier[low])
