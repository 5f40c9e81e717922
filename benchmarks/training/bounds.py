"""Whether the gradient's true error is under the stated bound, and how much of the bound is used.

Every audit runs backward once more with the exact tensors of the same step. So it measures the true error of the
gradient that training continued with. Audits come every second step here, far more often than by default. Audits before
all sites were measured run at the default level; they are in the rounds, but not in the figures.

A model from random weights takes some plain steps first. Its gradient halves within a few dozen steps, and a batch with
a byte that was never seen can have a gradient several times as large, which nothing predicts.

`bound_held` is the share of audits under the bound. `bound_used` is the mean of true error over bound.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from benchmarks.training.paired import train_step
from benchmarks.training.tasks import Task
from foveate.activations.compress import compress_activations
from foveate.activations.policy.options import ActivationOptions
from foveate.bench.shared.result import Measured
from foveate.progress import log

BOUNDS = (0.003, 0.01, 0.03, 0.1)
STEPS = 40


def audit_task(task: Task, bounds: Sequence[float], steps: int) -> list[dict[str, Any]]:
    """Train for some steps at each bound, from the same state, and return one row per audit."""
    torch.manual_seed(0)
    model = task.build(0)
    batches = task.batches(0)
    optimizer = task.optimizer(model)
    schedule = task.schedule(optimizer, task.steps)
    for _ in range(task.settle):
        train_step(task, model, optimizer, next(batches))
        schedule.step()
    start = copy.deepcopy((model.state_dict(), optimizer.state_dict(), schedule.state_dict()))
    seen = list(itertools.islice(batches, steps))
    rows: list[dict[str, Any]] = []
    for error in bounds:
        weights, moments, progress = copy.deepcopy(start)
        model.load_state_dict(weights)
        optimizer.load_state_dict(moments)
        schedule.load_state_dict(progress)
        torch.manual_seed(0)  # of dropout
        with compress_activations(model, error=error, options=ActivationOptions(audit_every=2)) as store:
            for batch in seen:
                train_step(task, model, optimizer, batch)
                schedule.step()
        common = {"part": "bounds", "model": task.name, "bound": error}
        rows += [
            common | {"step": step, "predicted": predicted, "error": audited}
            for step, predicted, audited in store.audits
        ]
        log.info("%s at %g: %d audits", task.name, error, len(store.audits))
    return rows


def measure_bounds(tasks: Iterable[Task], bounds: Sequence[float] = BOUNDS, steps: int = STEPS) -> Measured:
    """Audit every task at every bound."""
    rounds: list[dict[str, Any]] = []
    notes: list[str] = []
    for task in tasks:
        rounds += audit_task(task, bounds, steps)
        notes.append(f"{task.name}: bounds from {task.start} after {task.settle} plain steps")
    return Measured(_figures(rounds), rounds, notes)


def _figures(rounds: Sequence[dict[str, Any]]) -> dict[str, float]:
    used: dict[tuple[str, float], list[float]] = {}
    for row in rounds:
        if math.isfinite(row["predicted"]):
            used.setdefault((row["model"], row["bound"]), []).append(row["error"] / row["bound"])
    figures: dict[str, float] = {}
    for (model, bound), shares in used.items():
        figures[f"bound_held_{model}_{bound:g}"] = sum(v <= 1 for v in shares) / len(shares)
        figures[f"bound_used_{model}_{bound:g}"] = sum(shares) / len(shares)
    every = [share for shares in used.values() for share in shares]
    if every:
        figures["bound_held"] = sum(v <= 1 for v in every) / len(every)
        figures["bound_used"] = sum(every) / len(every)
        figures["bound_used_least"] = min(v for k, v in figures.items() if k.startswith("bound_used_"))
        figures["audits"] = len(every)
    return figures
