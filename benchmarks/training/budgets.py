"""Is a budget in bytes met?

A budget is a peak of one forward and backward: parameters, gradients, temporaries and what is stored; the optimizer's
state, which no level changes, is left out. Each model is asked for less than is possible, which must be refused with
the least that is; for that least; and for peaks between it and plain training's. Then the peak of an ordinary step is
counted, storage by storage.

`budget_met` is the share of budgets whose peak is at most 3 % above what was stated, `budget_peak_worst` the highest
peak over its budget, and `budget_refused` whether what is impossible was refused everywhere.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from benchmarks.training.tasks import Task
from foveate.activations.compress import compress_activations
from foveate.activations.memory.peak import PeakTracker
from foveate.activations.store import ActivationStore
from foveate.bench.result import Measured
from foveate.errors import BudgetError
from foveate.progress import log

#: Where between the least peak and plain training's the budgets are.
PLACES = (0.0, 0.25, 0.5, 0.75)
TOLERANCE = 1.03
#: Steps after which everything must have been measured.
_MOST_STEPS = 40


def _backward(task: Task, model: nn.Module, batch: Any) -> None:
    model.zero_grad()
    task.loss(model, batch).backward()


def peak_of_backward(task: Task, model: nn.Module, batch: Any, store: ActivationStore | None = None) -> int:
    """The most bytes of tensors alive during a forward and backward, the optimizer's left out."""
    model.zero_grad()
    held = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]
    with store or nullcontext(), PeakTracker([*model.parameters(), *model.buffers(), *held]) as tracker:
        _backward(task, model, batch)
    return int(tracker.timeline().peak({}))


def _compressed(task: Task, batch: Any, budget: int) -> tuple[int, float]:
    """The peak of an ordinary step under a budget, and the relative error that is predicted for it.

    Raises:
        BudgetError: no levels keep the peak within the budget.
    """
    torch.manual_seed(0)
    model = task.build(0)
    store = compress_activations(model, bytes=budget)
    with store:
        for _ in range(_MOST_STEPS):
            _backward(task, model, batch)
            if store.planner.levels:
                break
    while True:
        found = peak_of_backward(task, model, batch, store)
        assert store.latest is not None
        if not (store.latest.profiled or store.latest.probed):
            return found, store.latest.predicted


def _least(task: Task, batch: Any) -> int | None:
    """The least peak, as the refusal of an impossible budget states it; None if that is not refused."""
    try:
        _compressed(task, batch, 1)
    except BudgetError as refused:
        stated = re.search(r"the least possible is (\d+)", str(refused))
        if stated is None:
            raise
        return int(stated[1])
    return None


def _budgets(task: Task) -> Iterator[dict[str, Any]]:
    torch.manual_seed(0)
    model, batch = task.build(0), next(task.batches(0))
    plain, least = peak_of_backward(task, model, batch), _least(task, batch)
    common: dict[str, Any] = {"part": "budgets", "model": task.name, "plain": plain, "least": least}
    if least is None:
        yield common | {"budget": 1, "peak": None}
        return
    for place in PLACES:
        row = common | {"budget": round(least + place * (plain - least))}
        try:
            peak, predicted = _compressed(task, batch, row["budget"])
        except BudgetError as refused:
            yield row | {"peak": None, "refusal": str(refused)}
        else:
            log.info("%s: peak %d of %d bytes", task.name, peak, row["budget"])
            yield row | {"peak": peak, "foretold": predicted}


def measure_budgets(tasks: Iterable[Task]) -> Measured:
    """Ask every task for peaks that are impossible, just possible, and easier."""
    rounds = [row for task in tasks for row in _budgets(task)]
    figures: dict[str, float] = {}
    if rounds:
        shares = [row["peak"] / row["budget"] for row in rounds if row["peak"] is not None]
        figures["budget_met"] = sum(share <= TOLERANCE for share in shares) / len(rounds)
        figures["budget_peak_worst"] = max(shares, default=math.inf)
        figures["budget_refused"] = min(float(row["least"] is not None) for row in rounds)
    for row in rounds:
        if row["least"] is not None:
            figures[f"least_peak_ratio_{row['model'].rstrip('0123456789')}"] = row["plain"] / row["least"]
    return Measured(figures, rounds)
