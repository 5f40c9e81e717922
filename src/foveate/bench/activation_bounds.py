"""Is the gradient's true error under the bound that was stated, and is the bound not wasted?

Every audit runs backward once more with the exact tensors of the same step, so it knows the true error of the gradient
that training went on with. Audits come every second step here, far more often than by default; those before all sites
were measured, which run at the default level, are in the rounds and not in the figures.

`bound_held` is the share of audits under the bound, `bound_used` the mean of true error over bound.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from foveate.activations.compress import compress_activations
from foveate.bench.activation_tasks import Task
from foveate.bench.activation_training import train_step
from foveate.bench.result import Measured
from foveate.progress import log

BOUNDS = (0.003, 0.01, 0.03, 0.1)
STEPS = 40


def audited(task: Task, error: float, steps: int) -> list[dict[str, Any]]:
    """Train for some steps; one row an audit."""
    torch.manual_seed(0)
    model = task.build(0)
    optimizer, batches = task.optimizer(model), task.batches(0)
    schedule = task.schedule(optimizer, task.steps)
    torch.manual_seed(0)  # of dropout
    with compress_activations(model, error=error, audit_every=2) as store:
        for _ in range(steps):
            train_step(task, model, optimizer, next(batches))
            schedule.step()
    common = {"part": "bounds", "model": task.name, "bound": error}
    return [common | {"step": step, "foretold": told, "error": found} for step, told, found in store.audits]


def measure_bounds(tasks: Iterable[Task], bounds: Sequence[float] = BOUNDS, steps: int = STEPS) -> Measured:
    """Audit every task at every bound."""
    rounds: list[dict[str, Any]] = []
    for task in tasks:
        for error in bounds:
            rows = audited(task, error, steps)
            rounds += rows
            log.info("%s at %g: %d audits", task.name, error, len(rows))
    return Measured(_figures(rounds), rounds)


def _figures(rounds: Sequence[dict[str, Any]]) -> dict[str, float]:
    used: dict[tuple[str, float], list[float]] = {}
    for row in rounds:
        if math.isfinite(row["foretold"]):
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
