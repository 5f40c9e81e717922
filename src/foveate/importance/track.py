"""track_importance and importance_of: what a user calls to follow a model, and to see what its tiles are worth."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from foveate.allocate.constraints import DEFAULT_CONSTRAINTS, Constraints, check_constraints
from foveate.errors import DataError, FoveateError
from foveate.importance.options import TrackingOptions
from foveate.importance.tags import TileTags, tags_of
from foveate.importance.tasks import TaskProfile
from foveate.importance.tracker import TRACKERS, ImportanceTracker
from foveate.importance.verdict import Decision
from foveate.nn.registry import profile_of, registry_of
from foveate.precision.budgets import Budget


def track_importance(
    model: nn.Module,
    budget: Budget | None = None,
    *,
    options: TrackingOptions | None = None,
    constraints: Constraints = DEFAULT_CONSTRAINTS,
    tasks: Sequence[TaskProfile] = (),
    warm_up: TaskProfile | None = None,
    on_decision: Callable[[Decision], None] | None = None,
) -> ImportanceTracker:
    """Follow the importance of a live model's weights, and move bits to where the present task needs them.

        with fv.track_importance(model, fv.Budget(bits=3.0)) as tracker:
            for batch in stream:
                model(**batch)
        print(tracker.verdict)

    The levels are those of a frontier of this decider's own, each map of which takes at most the bytes of the map that
    it stands for. So indices, floors and requests keep their meaning. Levels change between two passes, if a move is
    worth it and a shadow run does not find it worse. A stream like the calibration data moves nothing. Mixtures of
    experts gain where a task uses other experts than calibration did; dense models rarely gain, and the verdict says
    so. Passes of a compiled model are not seen.

    Args:
        model: a quantized model with its profile, and a map or a frontier in force.
        budget: bytes, bits or loss of the best map; if not given, every map of the frontier in force is a budget.
        options: how importance is followed; `foveate.importance.PATENT` has the rules of patent 10846621.
        constraints: the levels to choose among; with level 0, what is not worth its bytes is zeroed, and comes back
            when it is. `tie` can give each expert one level.
        tasks: the profiles of known tasks, each a candidate; the shadow runs say which the stream is like.
        warm_up: the task whose importance following begins with; that of calibration if not given.
        on_decision: a function that is called with each `foveate.importance.Decision`.

    Returns:
        The tracker, a context manager. `tracker.close()` withdraws what it decided.

    Raises:
        FoveateError: the model is not quantized, has no levels or no profile, or is followed already.
        BudgetError: no map meets the budget.
        DataError: two tasks have one name, or a task is of another model.
    """
    check_constraints(constraints)
    registry = registry_of(model)
    if registry in TRACKERS:
        raise FoveateError(f"the importance of this model is followed already, by {TRACKERS[registry].name}")
    names = [task.name for task in tasks]
    if len({*names, "static", "online"}) < len(names) + 2:
        raise DataError(f"tasks are called {', '.join(names)}: names differ, and are not 'static' or 'online'")
    tracker = ImportanceTracker(model, budget, options or TrackingOptions(), constraints, tasks, warm_up, on_decision)
    TRACKERS[registry] = tracker
    return tracker


def importance_of(model: nn.Module) -> dict[str, TileTags]:
    """The tags of a live model: the level and the importance of every tile, by the weights' names.

    >>> fv.importance_of(model)["model.layers.0.mlp.up_proj:weight"].importance.shape

    Args:
        model: a quantized model with its profile.

    Returns:
        The importance is that of now where it is followed (`track_importance`), else that of calibration.

    Raises:
        FoveateError: the model is not quantized, or has no profile or no levels.
    """
    registry = registry_of(model)
    tracker = TRACKERS.get(registry)
    if tracker is not None:
        return tracker.tags()
    profile = profile_of(model)
    if registry.plan is None:
        raise FoveateError("the model has no levels yet: apply a map first")
    ones = {site.name: torch.ones(site.tiles, dtype=torch.float64) for site in profile.weight_sites()}
    return tags_of(registry.plan, profile, ones)
