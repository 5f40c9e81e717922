"""measure_frontier: the true divergence, the bytes and the times at about ten indices of a frontier.

The prediction of a profile is a sum over tiles, which can be off by a factor (`foveate.evaluate.verify`). Who moves
along a frontier while the model runs needs what the maps really lose. A few of the maps are measured on held-out data,
evenly spread over bytes, and `Frontier.kl` follows the predicted losses in between.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from foveate.collect.evaluation import evaluating
from foveate.collect.objectives import Objective, check_batches, named, run
from foveate.errors import BudgetError, DataError
from foveate.evaluate.machine import machine_name
from foveate.evaluate.timings import STEPS, one_at_a_time, time_maps
from foveate.evaluate.verify import Outcome, measure
from foveate.nn.levels import apply, withdraw
from foveate.nn.registry import registry_of
from foveate.precision.frontiers import Frontier, Point, point_name
from foveate.progress import track

#: Rounds in which a whole batch is timed at every point: a batch takes far longer than a token, and varies less.
_BATCH_ROUNDS = 2

#: Its maps are in force while it times, and are withdrawn.
_DECIDER = "timing"


def measure_frontier(
    model: nn.Module,
    frontier: Frontier,
    held_out: Iterable[Any],
    *,
    points: int = 10,
    reference: nn.Module | None = None,
    objective: Objective | None = None,
    timed: bool = True,
    progress: bool = True,
) -> Frontier:
    """Measure a frontier on held-out data. The map in force is applied again at the end.

        chain = fv.measure_frontier(model, fv.frontier(profile, 64), held_out, reference=original)
        chain.kl(10), chain.seconds(10), chain.find("4.25")
        fv.save(model, "out/", frontier=chain)

    Args:
        model: a quantized model.
        frontier: its frontier. Earlier measurements of it are replaced.
        held_out: data that were not used for calibration, as for `foveate.measure`. They are held in memory.
        points: how many maps are measured, at least 2: the first, the last, and others evenly spread over bytes.
        reference, objective, progress: as for `foveate.measure`.
        timed: whether to time a token (or a sample) alone and the first batch of `held_out`, at each point, on this
            machine with the threads that torch has now.

    Returns:
        The frontier with its points.

    Raises:
        BudgetError: fewer than 2 points are asked for.
        DataError: there are no batches, or outputs of the reference are not finite.
        PlaneNotResidentError: the model was loaded without planes that the best map reads.
        SiteError: the frontier is of another model.
    """
    if not isinstance(frontier, Frontier):
        raise BudgetError(f"frontier (={frontier!r}) is not a Frontier, such as foveate.frontier(profile, 64)")
    if type(points) is not int or points < 2:
        raise BudgetError(f"points (={points!r}) must be a whole number of at least 2")
    registry = registry_of(model)
    registry.check(frontier[0])
    batches = list(check_batches(held_out))
    if not batches:
        raise DataError("there are no batches to measure on")
    if objective is None and registry.profile is not None:
        objective = named(registry.profile.objective)
    indices = _spread(frontier, points)
    plans = [frontier[index] for index in indices]
    outcomes = measure(model, plans, batches, reference=reference, objective=objective, progress=progress)[:-1]
    alone, whole = _times(model, frontier, indices, batches[0], progress) if timed else ([None] * len(plans),) * 2
    names: set[str] = set()
    found = []
    for index, outcome, seconds, batch_seconds in zip(indices, outcomes, alone, whole, strict=True):
        plan, name = frontier[index], point_name(frontier[index])
        names.add(name := name if name not in names else f"{plan.bits:.4f} at {index}")
        found.append(
            Point(
                index=index,
                name=name,
                bits=plan.bits,
                bytes_read=plan.bytes_read,
                divergence=max(outcome.divergence, 0.0),  # below 0 by errors of float32 alone
                standard_error=_error(outcome),
                seconds=seconds,
                batch_seconds=batch_seconds,
            )
        )
    return replace(
        frontier,
        points=tuple(found),
        unit="divergence" if objective is None else objective.unit,
        machine=machine_name() if timed else "",
    )


def _error(outcome: Outcome) -> float:
    errors = [error for error in (outcome.standard_error, outcome.batch_error) if math.isfinite(error)]
    return max(errors, default=math.nan)


def _spread(frontier: Frontier, points: int) -> list[int]:
    """The indices to measure: for each of so many evenly spaced sizes the map that reads most nearly as much."""
    sizes = [plan.bytes_resident for plan in frontier]
    wanted = [sizes[0] + (sizes[-1] - sizes[0]) * i / (points - 1) for i in range(points)]
    nearest = {min(range(len(sizes)), key=lambda i: abs(sizes[i] - size)) for size in wanted}
    return sorted(nearest | {0, len(sizes) - 1})


def _times(
    model: nn.Module, frontier: Frontier, indices: list[int], batch: Any, progress: bool
) -> tuple[list[float | None], list[float | None]]:
    """(the seconds of a token or sample alone, the seconds of a whole batch) at each of some indices."""
    plans = [frontier[index] for index in indices]
    alone: list[float | None] = []
    whole: list[float | None] = []
    try:
        with evaluating(model), torch.inference_mode():
            for what in track(["a token", "a batch"], "timing", show=progress):
                apply(model, plans[0], decider=_DECIDER)
                if what == "a token":
                    alone += time_maps(model, plans, one_at_a_time(model, batch), STEPS)
                else:
                    whole += time_maps(model, plans, lambda: run(model, batch), 1, _BATCH_ROUNDS)
    finally:
        withdraw(model, _DECIDER)
    return alone, whole
