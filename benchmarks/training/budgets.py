"""Whether budgets in bytes are met.

A budget is the peak memory of one forward and backward: parameters, gradients, temporaries and stored tensors. The
optimizer's state is left out, because no level changes it. Each model is given an impossible budget, which
must be refused with a message that states the smallest possible peak. Then it is given that smallest peak, and peaks
between it and plain training's. Each time the peak of an ordinary step is counted, storage by storage.

`budget_met` is the share of budgets whose peak is at most 3 % above the budget. `budget_peak_worst` is the highest
ratio of peak to budget. `budget_refused` is 1 if every impossible budget was refused.
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
from foveate.bench.shared.result import Measured
from foveate.errors import BudgetError
from foveate.progress import log

#: Where the budgets are: 0 is the smallest possible peak, 1 the peak of plain training.
PLACES = (0.0, 0.25, 0.5, 0.75)
TOLERANCE = 1.03
#: The number of steps within which every site must have been measured.
_MAX_STEPS = 40


def _backward(task: Task, model: nn.Module, batch: Any) -> None:
    model.zero_grad()
    task.loss(model, batch).backward()


def peak_of_backward(task: Task, model: nn.Module, batch: Any, store: ActivationStore | None = None) -> int:
    """The peak bytes of all tensors alive during a forward and backward, without the optimizer's state."""
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
        for _ in range(_MAX_STEPS):
            _backward(task, model, batch)
            if store.planner.levels:
                break
    while True:
        peak = peak_of_backward(task, model, batch, store)
        assert store.latest is not None
        if not (store.latest.profiled or store.latest.probed):
            return peak, store.latest.predicted


def _smallest_peak(task: Task, batch: Any) -> int | None:
    """The smallest possible peak, as the refusal of an impossible budget states it; None if it is not refused."""
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
    plain, smallest = peak_of_backward(task, model, batch), _smallest_peak(task, batch)
    common: dict[str, Any] = {"part": "budgets", "model": task.name, "plain": plain, "least": smallest}
    if smallest is None:
        yield common | {"budget": 1, "peak": None}
        return
    for place in PLACES:
        row = common | {"budget": round(smallest + place * (plain - smallest))}
        try:
            peak, predicted = _compressed(task, batch, row["budget"])
        except BudgetError as refused:
            yield row | {"peak": None, "refusal": str(refused)}
        else:
            log.info("%s: peak %d of %d bytes", task.name, peak, row["budget"])
            yield row | {"peak": peak, "predicted": predicted}


def measure_budgets(tasks: Iterable[Task]) -> Measured:
    """Give every task budgets that are impossible, just possible, and larger."""
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
