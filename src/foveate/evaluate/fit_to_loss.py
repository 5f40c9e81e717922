"""fit_to_loss: the smallest map whose loss, measured on held-out data, stays within a limit.

`allocate` with `Budget(loss=...)` limits the *predicted* loss. The prediction can be off by a factor: it may be a fifth
of the true loss, or exceed it. `fit_to_loss` therefore searches for the predicted limit at which the *measured* loss
meets the limit that was asked for. Every map it tries is the best one for its predicted loss, so the search is along
one number. It steps by the ratio of the wanted to the measured loss, and interpolates once the limit is bracketed.

The limit holds for `Outcome.bound`: the mean on the held-out data plus twice its standard error. Other data of the same
kind are then within the limit too, in 39 of 40 cases. The held-out data choose only this one number, so they stay
almost unbiased; data of the calibration must not be used.
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

#: The search ends with a bound of at least this share of the limit.
_CLOSE_ENOUGH = 0.93
_MEASUREMENTS = 8


@dataclass(frozen=True)
class _Trial:
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
    """Find the smallest map whose measured loss is within a budget. The map in force is applied again at the end.

        found = fv.fit_to_loss(model, fv.Budget(loss=0.01), held_out, reference=original)
        fv.apply(model, found.plan)

    Args:
        model: a quantized model, with its profile.
        budget: `Budget(loss=...)`, in the objective's unit.
        held_out: data that were not used for calibration. They are read up to ten times.
        reference, objective, progress: as for `foveate.measure`.
        constraints: what the map must keep to, as for `foveate.allocate`.

    Returns:
        The map and its outcome, beside that of uniform precision at the same bytes; `within` is true.

    Raises:
        BudgetError: the budget is not a budget of loss; or no map meets it, and the message says what the best map
            measures; or the profile has no losses of inputs; or `constraints` are no `Constraints`.
        SiteError: a pattern of `constraints.tie` names no weight.
        FoveateError: the model was loaded without its profile.
    """
    if not isinstance(budget, Budget) or budget.loss is None:
        raise BudgetError(f"budget (={budget!r}) is not a budget of loss, such as Budget(loss=0.01)")
    profile, limit, data = profile_of(model), budget.loss, list(held_out)
    best = allocate(profile, Budget(bits=64), constraints)

    def attempt(target: float) -> _Trial:
        plan = best
        if target > best.predicted_loss * (1 + 1e-6):
            plan = allocate(profile, Budget(loss=target), constraints)
        found = measure(model, [plan], data, reference=reference, objective=objective, progress=progress)
        return _Trial(plan, found[0])

    tried = [attempt(limit)]
    while len(tried) < _MEASUREMENTS:
        target = _next_target(tried, limit)
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


def _next_target(tried: Sequence[_Trial], limit: float) -> float | None:
    """The next predicted loss to allocate for; None if a map that was tried is close enough to the limit."""
    under = max((t for t in tried if t.outcome.bound <= limit), key=lambda t: t.predicted, default=None)
    over = min((t for t in tried if t.outcome.bound > limit), key=lambda t: t.predicted, default=None)
    if under is not None and under.outcome.bound >= _CLOSE_ENOUGH * limit:
        return None
    wanted = limit * (1 + _CLOSE_ENOUGH) / 2
    if under is None or over is None:
        (only,) = [t for t in (under, over) if t is not None]
        factor = wanted / max(only.outcome.bound, 1e-12)
        return only.predicted * min(max(factor, 1 / 32), 8.0)
    if over.predicted < under.predicted * 1.02:
        return None  # measured and predicted order disagree, or no map lies between the two
    # interpolate linearly in logarithms, and stay well inside the bracket
    low, high = math.log(under.predicted), math.log(over.predicted)
    slope = math.log(over.outcome.bound / max(under.outcome.bound, 1e-12)) / (high - low)
    at = low + math.log(wanted / max(under.outcome.bound, 1e-12)) / max(slope, 1e-6)
    return math.exp(min(max(at, low + 0.15 * (high - low)), high - 0.15 * (high - low)))
