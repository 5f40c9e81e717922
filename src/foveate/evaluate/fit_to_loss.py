"""fit_to_loss: the fewest bits whose loss, measured on held-out data, stays within a limit.

`allocate` with `Budget(loss=...)` promises what it can know: that the profile predicts no more. What is predicted may
be a fifth of the truth, or more than it. So the limit that is given to `allocate` is moved until the *measured* loss
meets the one that was asked for: where it is over, tiles are raised in the order of loss taken away per byte, and where
it is far under, they are lowered in the opposite order. Every map on that way is the best for its predicted loss, and
the search is along one number, in steps of the ratio of measured to predicted.

What is promised is `Outcome.bound`: the mean on the held-out data plus twice its standard error, so that other data of
the same kind are within the limit too, 39 times of 40. Choosing one number on these data takes hardly anything from
that; data that were calibrated on must not be used.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from foveate.allocate import Constraints, allocate
from foveate.allocate.constraints import DEFAULT_CONSTRAINTS
from foveate.collect.objectives import Objective
from foveate.errors import BudgetError
from foveate.evaluate.verify import Outcome, Verification, measure, verify
from foveate.nn.registry import profile_of
from foveate.precision.budgets import Budget
from foveate.precision.maps import PrecisionMap

#: A bound of so much of the limit is near enough.
_ENOUGH = 0.93
_MEASUREMENTS = 8


@dataclass(frozen=True)
class _Tried:
    plan: PrecisionMap
    outcome: Outcome

    @property
    def predicted(self) -> float:
        return max(self.plan.predicted_loss, 1e-30)


def fit_to_loss(
    model: nn.Module,
    budget: Budget,
    held_out: Iterable[Any],
    *,
    reference: nn.Module | None = None,
    objective: Objective | None = None,
    constraints: Constraints = DEFAULT_CONSTRAINTS,
    progress: bool = True,
) -> Verification:
    """Find the cheapest map whose measured loss keeps a budget of loss. The map in force is put back at the end.

        found = fv.fit_to_loss(model, fv.Budget(loss=0.01), held_out, reference=original)
        fv.apply(model, found.plan)

    Args:
        model: a quantized model, with its profile.
        budget: `Budget(loss=...)`, in the objective's unit.
        held_out: data that were not calibrated on; gone through up to ten times.
        reference, objective, progress: as for `foveate.measure`.
        constraints: what the map must keep to, as for `foveate.allocate`.

    Returns:
        The map, measured beside uniform precision at its bytes; `within` is true.

    Raises:
        BudgetError: the budget is not one of loss, or no map keeps it; the message says what the best one measures.
            Or the profile does not say what inputs cost, or `constraints` are no `Constraints`.
        SiteError: a pattern of `constraints.tie` names no weight.
        FoveateError: the model was loaded without its profile.
    """
    if not isinstance(budget, Budget) or budget.loss is None:
        raise BudgetError(f"budget (={budget!r}) is not a budget of loss, such as Budget(loss=0.01)")
    profile, limit, data = profile_of(model), budget.loss, list(held_out)
    best = allocate(profile, Budget(bits=64), constraints)

    def attempt(target: float) -> _Tried:
        plan = best
        if target > best.predicted_loss * (1 + 1e-6):
            plan = allocate(profile, Budget(loss=target), constraints)
        found = measure(model, [plan], data, reference=reference, objective=objective, progress=progress)
        return _Tried(plan, found[0])

    tried = [attempt(limit)]
    while len(tried) < _MEASUREMENTS:
        target = _next(tried, limit)
        if target is None:
            break
        tried.append(attempt(target))
        if tried[-1].plan == tried[-2].plan:
            break
    kept = [t for t in tried if t.outcome.bound <= limit]
    if not kept:
        top = attempt(best.predicted_loss)
        if top.outcome.bound > limit:
            raise BudgetError(
                f"no map loses as little as {limit:g}: the best one measures {top.outcome.divergence:.4g}, "
                f"and on other data at most {top.outcome.bound:.4g}"
            )
        kept = [top]
    plan = min(kept, key=lambda t: t.plan.bytes_resident).plan
    return verify(model, plan, data, reference=reference, objective=objective, limit=limit, progress=progress)


def _next(tried: Sequence[_Tried], limit: float) -> float | None:
    """The predicted loss to allocate for next; None if what was tried is near enough."""
    under = max((t for t in tried if t.outcome.bound <= limit), key=lambda t: t.predicted, default=None)
    over = min((t for t in tried if t.outcome.bound > limit), key=lambda t: t.predicted, default=None)
    if under is not None and under.outcome.bound >= _ENOUGH * limit:
        return None
    wanted = limit * (1 + _ENOUGH) / 2
    if under is None or over is None:
        (only,) = [t for t in (under, over) if t is not None]
        factor = wanted / max(only.outcome.bound, 1e-12)
        return only.predicted * min(max(factor, 1 / 32), 8.0)
    if over.predicted < under.predicted * 1.02:
        return None  # not of one mind about which is better, or as near as maps lie
    # between the two, on a line through both in logarithms, and well inside
    low, high = math.log(under.predicted), math.log(over.predicted)
    slope = math.log(over.outcome.bound / max(under.outcome.bound, 1e-12)) / (high - low)
    at = low + math.log(wanted / max(under.outcome.bound, 1e-12)) / max(slope, 1e-6)
    return math.exp(min(max(at, low + 0.15 * (high - low)), high - 0.15 * (high - low)))
